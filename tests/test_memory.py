"""Memory: in place nothing but the index and a little scratch, out of place the outputs as well. Measured as peak
resident memory of a process of its own, so that scratch that torch's allocator does not know is counted too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lagkv_ext

ROOT = Path(lagkv_ext.__file__).resolve().parent.parent

PROGRAM = """
import json, re, sys
import torch
import lagkv_ext

def peak():
    # not ru_maxrss: that starts from the peak of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024

op, score = sys.argv[1:]
run = getattr(lagkv_ext, op)
small = [torch.randn(1, 2, 2048, 128).bfloat16() for _ in range(2)]
run(*small, score=score)  # threads, code and caches are there before the measurement
key, value = (torch.full((1, 8, 49152, 128), 0.5, dtype=torch.bfloat16) for _ in range(2))
cache = key.nbytes + value.nbytes
before = peak()
result = run(key, value, score=score)
grown = peak() - before
outputs = sum(x.nbytes for x in (result if op == "compress" else [result]))
print(json.dumps({"cache": cache, "grown": grown, "outputs": outputs}))
"""


@pytest.mark.parametrize("score", ["std", "cosine"])
@pytest.mark.parametrize("op", ["compress_", "compress"])
def test_peak_memory(op, score):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, op, score], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["cache"] > 190e6
    extra = measured["grown"] - measured["outputs"]
    assert extra <= 0.01 * measured["cache"], f"{extra / 1e6:.1f} MB besides the outputs: {measured}"
    assert op == "compress" or measured["outputs"] < 0.01 * measured["cache"]


def test_peak_memory_would_show_a_copy():
    """The measurement sees a copy of the cache."""
    program = PROGRAM.replace("result = run(", "copy = key.clone(); result = run(")
    done = subprocess.run(
        [sys.executable, "-c", program, "compress_", "std"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["grown"] > 0.45 * measured["cache"]
