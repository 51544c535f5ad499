"""Properties that only a card shows: streams, graphs, devices, sync-free launches, sizes past 2^31, memory.

Marked ``gpu``. The operator suite itself runs on the card as backend ``cuda`` (``pytest -m gpu`` runs both).
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import lagkv_ext

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

START, LAG_SIZE, KEEP = 16, 128, 32
OPS = torch.ops.lagkv


def states(
    length: int, heads: int = 8, dim: int = 128, dtype: torch.dtype = torch.bfloat16, device: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(length)
    key, value = (
        torch.randn(1, heads, length, dim, device=device, dtype=dtype, generator=generator) for _ in range(2)
    )
    return key, value


def assert_same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a.cpu(), b.cpu())


def test_launches_on_the_current_stream() -> None:
    """A side stream is held up, then fills the input: a launch on any other stream would read what was there before."""
    key, value = states(4096)
    expected = OPS.compress(key, value, START, LAG_SIZE, KEEP)
    late_key, late_value = torch.zeros_like(key), torch.zeros_like(value)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late_key.copy_(key)
        late_value.copy_(value)
        result = OPS.compress(late_key, late_value, START, LAG_SIZE, KEEP)
    stream.synchronize()
    assert_same(result, expected)


OPTIONS = {"score": "blend", "smooth": 3, "budget": "head"}


@pytest.mark.parametrize("score", ["std", "cosine", "blend"])
def test_never_waits_for_the_device(score: str) -> None:
    key, value = states(4096)
    carried, scores = torch.zeros(1, 8, 5, device="cuda"), torch.zeros(1, 8, 4096, device="cuda")
    OPS.compress(key, value, START, LAG_SIZE, KEEP, score=score)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        index = OPS.compress(key, value, START, LAG_SIZE, KEEP, score=score)[2]
        OPS.compact(key, index)
        OPS.topk_index(OPS.lag_score(key, value, START, LAG_SIZE, score=score), KEEP)
        OPS.partition_bounds(key, START, LAG_SIZE)
        OPS.compress(key, value, START, LAG_SIZE, KEEP, smooth=3, score=score)
        OPS.compress_carried(key, value, carried, START, LAG_SIZE, KEEP, smooth=3, score=score)
        OPS.compress_(
            key.clone(), value.clone(), START, LAG_SIZE, KEEP, score=score, budget="head", scores=scores
        )
        OPS.compress_(key, value, START, LAG_SIZE, KEEP, score=score)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["paper", "options"])
@pytest.mark.parametrize("in_place", [False, True])
def test_captured_in_a_graph(in_place: bool, options: dict[str, Any]) -> None:
    key, value = states(2048)
    static_key, static_value = key.clone(), value.clone()

    def step() -> tuple[torch.Tensor, ...]:
        if not in_place:
            return OPS.compress(static_key, static_value, START, LAG_SIZE, KEEP, **options)
        index = OPS.compress_(static_key, static_value, START, LAG_SIZE, KEEP, **options)
        rows = index.shape[2]
        return static_key[:, :, :rows], static_value[:, :, :rows], index

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    static_key.copy_(key)
    static_value.copy_(value)
    with torch.cuda.graph(graph):
        outputs = step()
    for seed in range(3):
        torch.manual_seed(seed)
        static_key.normal_()
        static_value.normal_()
        expected = OPS.compress(static_key.clone(), static_value.clone(), START, LAG_SIZE, KEEP, **options)
        graph.replay()
        assert_same(outputs, expected)


def test_compiled_with_reduced_overhead() -> None:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = lagkv_ext.compress(key, value, lag_size=LAG_SIZE, keep=KEEP, sink_size=START)
        return torch.nn.functional.scaled_dot_product_attention(query, out.key, out.value) * 2

    compiled = torch.compile(attend, fullgraph=True, mode="reduce-overhead")
    key, value = states(2048, dtype=torch.float32)
    query = torch.randn(1, 8, 4, 128, device="cuda")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(query, key, value), attend(query, key, value))
        key = key + 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_other_than_the_current_device() -> None:
    key, value = states(2048, device="cuda:1")
    with torch.cuda.device(0):
        result = OPS.compress(key, value, START, LAG_SIZE, KEEP)
        assert torch.cuda.current_device() == 0
    assert all(x.device == key.device for x in result)
    assert_same(result, OPS.compress(key.to("cuda:0"), value.to("cuda:0"), START, LAG_SIZE, KEEP))
    with pytest.raises(RuntimeError, match=r"value must be on the device of key \(cuda:1\), got cuda:0"):
        OPS.compress(key, value.to("cuda:0"), START, LAG_SIZE, KEEP)


def test_cpu_and_cuda_mixed() -> None:
    key, value = states(512)
    with pytest.raises(RuntimeError, match=r"value must be on the device of key \(cuda:0\), got cpu"):
        OPS.compress(key, value.cpu(), START, LAG_SIZE, KEEP)


@pytest.mark.parametrize("in_place", [False, True])
def test_more_than_two_to_the_31_elements(in_place: bool) -> None:
    """The last partitions of a huge tensor are chosen and copied as those of a small one that holds only them."""
    heads, dim = 2, 128
    length = 2**31 // (heads * dim) + 8 * LAG_SIZE + START
    length += (START - length) % LAG_SIZE  # no remainder
    needed = 2 * heads * length * dim * 2 * (1 if in_place else 2)
    free = torch.cuda.mem_get_info()[0]
    if free < needed * 1.1:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory, has {free / 2**30:.0f}")
    key = torch.empty(1, heads, length, dim, dtype=torch.bfloat16, device="cuda").normal_()
    value = torch.empty_like(key).normal_()
    assert key.numel() > 2**31
    tail = 5 * LAG_SIZE
    small = OPS.compress(key[:, :, -tail:].contiguous(), value[:, :, -tail:].contiguous(), 0, LAG_SIZE, KEEP)
    if in_place:
        index = OPS.compress_(key, value, START, LAG_SIZE, KEEP)
        big = (key[:, :, : index.shape[2]], value[:, :, : index.shape[2]], index)
    else:
        big = OPS.compress(key, value, START, LAG_SIZE, KEEP)
    rows = small[2].shape[2]
    assert_same((big[0][:, :, -rows:], big[1][:, :, -rows:], big[2][:, :, -rows:] - (length - tail)), small)


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["paper", "options"])
def test_in_place_needs_a_hundredth_of_the_cache(options: dict[str, Any]) -> None:
    """And the scores, where they are chosen from later."""
    key, value = states(32768)
    OPS.compress_(*states(1024), START, LAG_SIZE, KEEP)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    OPS.compress_(key, value, START, LAG_SIZE, KEEP, **options)
    extra = torch.cuda.max_memory_allocated() - before
    scores = 4 * key[..., 0].numel() if options else 0
    assert extra <= 0.01 * (key.nbytes + value.nbytes) + scores


def test_an_index_out_of_range_is_an_error_on_the_device() -> None:
    """It poisons the CUDA context, so it happens in a process of its own."""
    code = (
        "import torch, lagkv_ext\n"
        "x = torch.zeros(1, 1, 4, 8, device='cuda')\n"
        "torch.ops.lagkv.compact(x, torch.full((1, 1, 2), 4, dtype=torch.int32, device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "CUDA error" in done.stderr
