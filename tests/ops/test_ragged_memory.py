"""Memory of the ragged operators in place: the index and a little scratch, also where pages are put together."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.ops.test_memory import ROOT

PROGRAM = """
import json, re, sys
import torch
import lagkv_ext

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024

def numbers(*values):
    return torch.tensor(values, dtype=torch.int32)

def make(op, tokens):
    if op == "compress_ragged_":
        pair = [torch.full((2, 8, tokens, 128), 0.5, dtype=torch.bfloat16) for _ in range(2)]
        return *pair, numbers(16, 16), numbers(tokens, tokens // 3)
    pair = [torch.full((tokens // 8, 16, 8, 128), 0.5, dtype=torch.bfloat16) for _ in range(2)]
    table = torch.randperm(tokens // 8).int().view(2, -1)
    return *pair, table, numbers(16, 16), numbers(tokens, tokens // 3)

op = sys.argv[1]
run = getattr(lagkv_ext, op)
run(*make(op, 2048))  # threads, code and caches are there before the measurement
arguments = make(op, 24576)
cache = arguments[0].nbytes + arguments[1].nbytes
before = peak()
index = run(*arguments)
print(json.dumps({"cache": cache, "grown": peak() - before, "index": index.nbytes, "length": arguments[-1].tolist()}))
"""


@pytest.mark.parametrize("op", ["compress_ragged_", "compress_paged_"])
def test_peak_memory(op):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, op], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["cache"] > 190e6
    assert measured["length"][0] < 24576 / 3
    extra = measured["grown"] - measured["index"]
    assert extra <= 0.01 * measured["cache"], f"{extra / 1e6:.1f} MB besides the index: {measured}"
