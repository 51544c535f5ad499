"""Loads the compiled operator libraries and tells what was built, what was loaded, and why something was not."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from lagkv_ext.version import __version__

_FOLDER = Path(__file__).resolve().parent
_BUILD_INFO = _FOLDER / "_build_info.json"  # written by setup.py beside the libraries
_OPERATORS = (
    "compress",
    "compress_carried",
    "compress_",
    "partition_bounds",
    "lag_score",
    "topk_index",
    "compact",
    "compress_ragged_",
    "compress_varlen",
    "compress_paged_",
    "compress_blocks",
)
_BUILD_AGAIN = "Run 'pip install .' (or 'make build' for a checkout) in the source folder."

_cuda_status = "not loaded"


def load() -> None:
    """Load ``_C`` (schemas and CPU kernels) and, where torch has CUDA, ``_cuda``. A failure is an ImportError."""
    global _cuda_status
    # Registering the same schemas twice ends the process, so a second copy (an installed one beside a checkout,
    # say) is refused here.
    if hasattr(torch.ops.lagkv, "compress"):
        others = [path for path in torch.ops.loaded_libraries if Path(path).name.startswith("_C.")]
        raise ImportError(
            f"the lagkv operators are already registered in this process (loaded: {others or 'unknown'}); "
            f"{_FOLDER} would register them twice. Keep one copy of lagkv_ext on sys.path."
        )
    _load_library("_C")
    # A checkout that was updated and not built again: say so here, not where the first new operator is used.
    if missing := [name for name in _OPERATORS if not hasattr(torch.ops.lagkv, name)]:
        raise ImportError(
            f"{_FOLDER / '_C.abi3.so'} is older than the Python beside it: it has no {', '.join(missing)}. "
            f"{_BUILD_AGAIN}"
        )
    build = build_info()["cuda"]
    if torch.version.cuda is None:
        _cuda_status = "not loaded: this torch has no CUDA"
    elif not build["built"]:
        _cuda_status = f"not loaded: {build['reason']}"
    elif build["nvcc"].split(".")[0] != torch.version.cuda.split(".")[0]:
        # Two CUDA runtimes in one process, if the other one is there at all.
        raise ImportError(
            f"{_FOLDER} was built with CUDA {build['nvcc']}, torch {torch.__version__} has CUDA {torch.version.cuda}. "
            f"Install a torch with CUDA {build['nvcc'].split('.')[0]}, or a wheel of lagkv_ext without CUDA. "
            f"{_BUILD_AGAIN}"
        )
    else:
        _load_library("_cuda")
        _cuda_status = "loaded"


def build_info() -> dict[str, Any]:
    """Reads what setup.py recorded: compilers, torch, architectures, and the reason where CUDA was not built."""
    return json.loads(_BUILD_INFO.read_text(encoding="utf-8"))


def info() -> dict[str, Any]:
    """Version, build and run-time facts, as ``python -m lagkv_ext info`` prints them."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.version.cuda
        else []
    )
    return {
        "lagkv_ext": __version__,
        "folder": str(_FOLDER),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "gpus": gpus,
        "cpu_isa": torch.ops.lagkv._cpu_isa(),
        "cpu_threads": torch.get_num_threads(),
        "cuda_kernels": _cuda_status,
        "build": build_info(),
    }


def _load_library(name: str) -> None:
    path = _FOLDER / f"{name}.abi3.so"
    if not path.exists() or not _BUILD_INFO.exists():
        raise ImportError(f"{path} is missing: lagkv_ext was not built here. {_BUILD_AGAIN}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(f"{path} could not be loaded with torch {torch.__version__}: {error}") from error


load()
