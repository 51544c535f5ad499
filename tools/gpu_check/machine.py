"""``python -m tools.gpu_check.machine``: the facts of this machine and its card as JSON, from a process of its own.

The process that runs the steps holds no CUDA context: its memory would count, and profilers would see it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "numpy",
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "ninja",
    "pybind11",
)
CARD_QUERY = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,"
    "ecc.mode.current,mig.mode.current"
)
SOURCES = ("csrc/**/*", "lagkv_ext/**/*.py", "benchmarks/*.py", "setup.py")


def facts() -> dict[str, Any]:
    import torch

    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "card": card.name if card else None,
        "capability": f"{card.major}.{card.minor}" if card else None,
        "card_memory_bytes": card.total_memory if card else None,
        "multiprocessors": card.multi_processor_count if card else None,
        "l2_bytes": card.L2_cache_size if card else None,
        "cuda": torch.version.cuda,
        "nvidia_smi": output(["nvidia-smi", f"--query-gpu={CARD_QUERY}", "--format=csv,noheader"]),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": output(["git", "rev-parse", "--short=12", "HEAD"]),
        "sources": sources_digest(),
    }


def sources_digest() -> str:
    """Tells which sources ran where a copy of the tree came without its history."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()}):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def output(command: list[str]) -> str | None:
    """Output of a command; None where it is not there or failed."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    json.dump(facts(), sys.stdout)
