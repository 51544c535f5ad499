"""Builds the executor with CMake and Ninja on demand, and imports it.

The build lives in ``build/simt/`` of the checkout and is kept: a later run compiles what has changed, and nothing where
nothing has.

``LAGKV_SIMT_SANITIZE=1`` takes a build with AddressSanitizer, which the process must be started with:
``LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
ASAN_OPTIONS=detect_leaks=0:allow_user_segv_handler=1:use_sigaltstack=0``.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ("cuda_fp16.h", "cuda_bf16.h", "vector_types.h")


class Unavailable(ImportError):
    """The executor cannot be built on this machine; the message says what is missing.

    A kernel that does not compile is an error of its own (RuntimeError), never this.
    """


def cuda_headers() -> Path | None:
    """A folder with CUDA's headers: of a toolkit, or of the wheels that torch's CUDA builds bring along."""
    folders = [Path(home) / "include" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    spec = importlib.util.find_spec("nvidia")
    for location in spec.submodule_search_locations or [] if spec else []:
        folders += sorted(Path(location).glob("*/include"), reverse=True)
    for folder in folders:
        if all((folder / header).exists() for header in HEADERS):
            return folder
    return None


def tool(name: str) -> str:
    """A program, from this Python's environment before that of the machine."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        raise Unavailable(f"{name} was not found ({sys.executable} -m pip install {name})")
    return found


def build_module(*, sanitize: bool = False) -> Path:
    """Path of the built module. Raises Unavailable where it cannot be built, RuntimeError where compiling fails."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable(
            f"the executor's context switch is for x86-64, this machine is {platform.machine()}"
        )
    cmake, ninja = tool("cmake"), tool("ninja")
    if importlib.util.find_spec("pybind11") is None:
        raise Unavailable(f"pybind11 was not found ({sys.executable} -m pip install pybind11)")
    headers = cuda_headers()
    if headers is None:
        raise Unavailable("no CUDA headers were found: set CUDA_HOME, or pip install nvidia-cuda-runtime")

    environment = hashlib.sha256(f"{sys.prefix} {headers}".encode()).hexdigest()[:8]
    name = f"{sys.implementation.cache_tag}-{environment}{'-asan' if sanitize else ''}"
    folder = ROOT / "build" / "simt" / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "build.ninja").exists():
            _run(
                [
                    *(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
                    f"-DCMAKE_MAKE_PROGRAM={ninja}",
                    "-DCMAKE_BUILD_TYPE=Release",
                    "-DCMAKE_CXX_FLAGS_RELEASE=-O2",
                    f"-DPython_EXECUTABLE={sys.executable}",
                    f"-DLAGKV_CUDA_HEADERS={headers}",
                    "-DLAGKV_BUILD_CPU=OFF",
                    "-DLAGKV_BUILD_CUDA=OFF",
                    "-DLAGKV_BUILD_SIMT=ON",
                    f"-DLAGKV_SANITIZE={'ON' if sanitize else 'OFF'}",
                ]
            )
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        _run([cmake, "--build", str(folder), "--target", "lagkv_simt", "--parallel", jobs])
    found = list(folder.glob("tests/simt/lagkv_simt*.so"))
    if len(found) != 1:
        raise RuntimeError(f"the build left {len(found)} modules in {folder / 'tests/simt'}, expected one")
    return found[0]


@functools.cache
def module() -> ModuleType:
    """The executor, built where needed; the functions that run kernels are its attributes."""
    path = build_module(sanitize=os.environ.get("LAGKV_SIMT_SANITIZE") == "1")
    spec = importlib.util.spec_from_file_location("lagkv_simt", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    print(build_module(sanitize="--sanitize" in sys.argv[1:]))
