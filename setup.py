"""Builds the two operator libraries: ``_C`` (schemas, CPU kernels) and, where nvcc and a CUDA torch are, ``_cuda``.

Environment: ``LAGKV_BUILD_CUDA`` = auto (default) | 0 | 1 (1: fail where CUDA cannot be built);
``TORCH_CUDA_ARCH_LIST`` = architectures (default: those of a wheel); ``MAX_JOBS``; ``CXX`` and ``PYTORCH_NVCC`` =
compilers.
Everything else (name, dependencies, extras) is in pyproject.toml.
"""

import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    raise SystemExit(
        f"building lagkv_ext needs torch >= 2.10 ({error}): pip install it first, or drop --no-build-isolation"
    ) from error

ROOT = Path(__file__).resolve().parent
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]
# No contraction: kernels say where a product and a sum may round once, and score K + V must equal V + K.
CXX_FLAGS = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", *STABLE_ABI]
NVCC_FLAGS = ["-O3", "--compiler-options=-fvisibility=hidden", "-DUSE_CUDA", "-lineinfo", *STABLE_ABI]
WHEEL_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern))


def why_no_cuda() -> str:
    """Empty where the CUDA library can be built, else the reason in one sentence."""
    wish = os.environ.get("LAGKV_BUILD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"LAGKV_BUILD_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return "switched off by LAGKV_BUILD_CUDA=0"
    if not sources("csrc/cuda", "*.cu"):
        return "this source tree has no CUDA sources"
    if torch.version.cuda is None:
        return f"torch {torch.__version__}, with which this was built, has no CUDA"
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return "no nvcc was found (set CUDA_HOME to a CUDA toolkit)"
    release = nvcc_release()
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc {release} and torch's CUDA {torch.version.cuda} differ in the major version"
    return ""


def nvcc_release() -> str:
    text = subprocess.run(
        [f"{CUDA_HOME}/bin/nvcc", "--version"], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"release ([0-9.]+)", text)
    if found is None:
        raise SystemExit(f"nvcc --version of {CUDA_HOME} names no release: {text!r}")
    return found.group(1)


def soname(name: str) -> list[str]:
    """So that a C++ program linked with the library looks for its name, and not for the folder it was built in."""
    return [f"-Wl,-soname,{name}.abi3.so"]


def extensions(no_cuda: str) -> list:
    built = [
        CppExtension(
            "lagkv_ext._C",
            ["csrc/schemas.cpp", *sources("csrc/cpu", "**/*.cpp")],
            include_dirs=[str(ROOT / "csrc")],
            depends=sources("csrc", "**/*.h"),
            extra_compile_args={"cxx": CXX_FLAGS},
            extra_link_args=soname("_C"),
            py_limited_api=True,
        )
    ]
    if not no_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", WHEEL_ARCHITECTURES)
        built.append(
            CUDAExtension(
                "lagkv_ext._cuda",
                sources("csrc/cuda", "**/*.cu"),
                include_dirs=[str(ROOT / "csrc")],
                depends=sources("csrc", "**/*.h") + sources("csrc", "**/*.cuh"),
                extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
                extra_link_args=soname("_cuda"),
                py_limited_api=True,
            )
        )
    return built


def compiler_version() -> str:
    command = os.environ.get("CXX", "c++").split()
    command = [part for part in command if not part.endswith("ccache")] or ["c++"]
    if shutil.which(command[0]) is None:
        raise SystemExit(f"lagkv_ext needs a C++ compiler: {command[0]!r} was not found (set CXX)")
    return subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]


def instruction_sets() -> list[str]:
    """The levels csrc/cpu has kernels for; which one runs is chosen at run time."""
    levels = [Path(source).stem for source in sources("csrc/cpu/kernels", "*.cpp")]
    return levels if platform.machine() in ("x86_64", "AMD64") else ["portable"]


class BuildWithInfo(BuildExtension):
    """BuildExtension that also leaves ``_build_info.json`` beside the libraries."""

    no_cuda = why_no_cuda()

    def run(self) -> None:
        print(f"lagkv_ext: CPU kernels with torch {torch.__version__}, {compiler_version()}")
        print(f"lagkv_ext: CUDA kernels {'NOT built: ' + self.no_cuda if self.no_cuda else 'will be built'}")
        if self.no_cuda and os.environ.get("LAGKV_BUILD_CUDA") == "1":
            raise SystemExit(f"LAGKV_BUILD_CUDA=1, but CUDA kernels cannot be built: {self.no_cuda}")
        super().run()
        folder = Path(self.get_ext_fullpath("lagkv_ext._C")).parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build_info.json").write_text(
            json.dumps(self.build_info(), indent=2) + "\n", encoding="utf-8"
        )

    def build_info(self) -> dict:
        cuda = {"built": not self.no_cuda, "reason": self.no_cuda}
        if not self.no_cuda:
            cuda.update(
                nvcc=nvcc_release(),
                architectures=os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ").split(),
            )
        return {
            "torch": torch.__version__,
            "compiler": compiler_version(),
            "abi": "torch stable ABI >= 2.10, Python abi3 >= 3.10",
            "cpu": {"instruction_sets": instruction_sets()},
            "cuda": cuda,
        }

    def get_outputs(self) -> list[str]:
        outputs = super().get_outputs()
        if not self.editable_mode:
            outputs.append(str(Path(self.get_ext_fullpath("lagkv_ext._C")).parent / "_build_info.json"))
        return outputs


setup(
    ext_modules=extensions(BuildWithInfo.no_cuda),
    cmdclass={"build_ext": BuildWithInfo},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
