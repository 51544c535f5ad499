"""Do the sources compile with the headers of the oldest torch that pyproject.toml admits?

``python tools/check_headers.py [VERSION]``: fetches that release (its CPU wheel for aarch64: the same headers in a
fifth of the size), and compiles, to nothing, every source that includes torch. A build with a newer torch cannot tell:
what a later release added to its headers is there. Status 1 where a source does not compile. CUDA sources need nvcc.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]


def oldest() -> str:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (version,) = set(re.findall(r'"torch>=(\d+\.\d+)"', text))
    return f"{version}.0"


def fetch(version: str, folder: Path) -> Path:
    """The include folder of a release."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
            *("--platform", "manylinux_2_28_aarch64", "--python-version", "3.11"),
            *(f"torch=={version}", "--dest", str(folder)),
        ],
        check=True,
    )
    (wheel,) = folder.glob("torch-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [x for x in archive.namelist() if x.startswith("torch/include/")])
    return folder / "torch/include"


def compilations(include: Path) -> dict[str, list[str]]:
    """A command for each source that needs torch."""
    torch = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
    host = ["c++", "-fsyntax-only", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}", *torch]
    commands = {
        name: [*host, "-std=c++17", *DEFINES, name] for name in ("csrc/schemas.cpp", "csrc/cpu/ops.cpp")
    }
    commands["tests/ops/cpp/operators.cpp"] = [
        *host,
        *("-std=c++20", f"-I{ROOT / 'lagkv_ext/include'}", "tests/ops/cpp/operators.cpp"),
    ]
    nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc")
    if nvcc.exists():
        device = [f"-I{ROOT / 'csrc'}", *torch, "-DUSE_CUDA", "--expt-relaxed-constexpr"]
        name = "csrc/cuda/ops.cu"
        commands[name] = [str(nvcc), "-std=c++17", "-ptx", "-o", os.devnull, *device, *DEFINES, name]
    else:
        print(f"csrc/cuda/ops.cu: left out, there is no {nvcc}")
    return commands


def main() -> int:
    version = sys.argv[1] if len(sys.argv) > 1 else oldest()
    if shutil.which("c++") is None:
        print("needs a C++ compiler: c++ was not found", file=sys.stderr)
        return 2
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name, command in compilations(fetch(version, Path(folder))).items():
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            print(
                f"torch {version}: {name}: {'ok' if done.returncode == 0 else 'does NOT compile'}", flush=True
            )
            if done.returncode != 0:
                print(done.stderr)
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
