"""``torch.library.opcheck`` of every operator: schema, fake kernel, autograd registration, and tracing with both."""

# ruff: noqa: E501  (schemas: one a line)

from __future__ import annotations

import pytest
import torch

from tests.ops.backends import cpu_isa

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu])]


def samples(device: str, requires_grad: bool) -> dict[str, tuple]:
    generator = torch.Generator().manual_seed(0)

    def rows(length: int, dim: int, grad: bool = requires_grad) -> torch.Tensor:
        x = torch.randn(2, 3, length, dim, generator=generator).to(device)
        return x.requires_grad_(grad)

    index = torch.randint(0, 9, (2, 3, 5), generator=generator, dtype=torch.int32).to(device)
    transposed = (
        torch.randn(2, 30, 3, 8, generator=generator).to(device).transpose(1, 2).requires_grad_(requires_grad)
    )

    def packed(length: int, dim: int) -> torch.Tensor:
        return torch.randn(length, 3, dim, generator=generator).to(device).requires_grad_(requires_grad)

    def pages(blocks: int, dim: int) -> torch.Tensor:
        return torch.randn(blocks, 8, 3, dim, generator=generator).to(device)

    def numbers(*values: int | list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def scores(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    tables = numbers([0, 1, 2, 3, 4, 5, 6], [-1] * 7), numbers([7, 8, 9], [-1] * 3)
    return {
        "compress": ("compress", (rows(30, 8), rows(30, 5), 2, 7, 3), {}),
        "compress-cosine": (
            "compress",
            (transposed, rows(30, 8), 2, 7, 3),
            {"score": "cosine", "value_weight": 0.5},
        ),
        "compress-short": ("compress", (rows(10, 8), rows(10, 5), 2, 7, 3), {}),
        "compress_": ("compress_", (rows(30, 8, False), rows(30, 5, False), 2, 7, 3), {}),
        "compress_-short": (
            "compress_",
            (rows(10, 8, False), rows(10, 5, False), 2, 7, 3),
            {"score": "cosine"},
        ),
        "compress-head": (
            "compress",
            (rows(30, 8), rows(30, 5), 2, 7, 3),
            {"score": "blend", "smooth": 3, "budget": "head"},
        ),
        "compress_carried": (
            "compress_carried",
            (rows(30, 8), rows(30, 5), scores(2, 3, 4), 6, 7, 3),
            {"smooth": 3},
        ),
        "compress_carried-short": (
            "compress_carried",
            (rows(10, 8), rows(10, 5), scores(2, 3, 4), 6, 7, 3),
            {},
        ),
        "compress_-scores": (
            "compress_",
            (rows(30, 8, False), rows(30, 5, False), 4, 7, 3),
            {"score": "blend", "budget": "head", "scores": scores(2, 3, 30), "sink_size": 2},
        ),
        # Going backward through these is refused (tests/ops/test_autograd.py), which opcheck would do.
        "partition_bounds": ("partition_bounds", (rows(30, 8, False), 2, 7), {}),
        "lag_score": ("lag_score", (rows(30, 8, False), rows(30, 5, False), 2, 7), {"value_weight": 2.0}),
        "topk_index": ("topk_index", (rows(30, 8), 3), {}),
        "compact": ("compact", (rows(9, 8), index), {}),
        "compress_ragged_": (
            "compress_ragged_",
            (rows(30, 8, False), rows(30, 5, False), numbers(2, 0), numbers(30, 12), 7, 3),
            {"score": "cosine"},
        ),
        # Nothing is dropped, as rows past the last sequence hold whatever the memory held.
        "compress_varlen": (
            "compress_varlen",
            (packed(30, 8), packed(30, 5), numbers(0, 21, 30), numbers(2, 2), 7, 7),
            {"value_weight": 0.5},
        ),
        "compress_paged_": (
            "compress_paged_",
            (
                pages(6, 8),
                pages(6, 5),
                numbers([3, 0, 5, -1], [1, 7, 7, 7]),
                numbers(1, 0),
                numbers(21, 5),
                7,
                3,
            ),
            {},
        ),
        "compress_ragged_-scores": (
            "compress_ragged_",
            (rows(30, 8, False), rows(30, 5, False), numbers(4, 0), numbers(30, 12), 7, 3),
            {"smooth": 3, "budget": "head", "scores": scores(2, 3, 30), "sink_size": 2},
        ),
        "compress_varlen-head": (
            "compress_varlen",
            (packed(30, 8), packed(30, 5), numbers(0, 21, 30), numbers(2, 2), 7, 7),
            {"score": "blend", "budget": "head"},
        ),
        "compress_paged_-scores": (
            "compress_paged_",
            (pages(6, 8), pages(6, 5), numbers([3, 0, 5], [1, 7, 7]), numbers(4, 0), numbers(21, 5), 7, 3),
            {"budget": "head", "scores": scores(6, 8, 3), "sink_size": 2},
        ),
        "compress_blocks": (
            "compress_blocks",
            (pages(12, 8), pages(12, 5), *tables, numbers(0, 1), numbers(2, 1), 5, 16, 8),
            {"score": "cosine"},
        ),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("sample", samples("cpu", False))
def test_opcheck(sample, requires_grad, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    op, arguments, keywords = samples(device, requires_grad)[sample]
    torch.library.opcheck(getattr(torch.ops.lagkv, op).default, arguments, keywords)


def test_every_operator_is_checked():
    public = {
        name.removeprefix("lagkv::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("lagkv::")
    }
    assert {name for name in public if not name.startswith("_")} == {
        op for op, _, _ in samples("cpu", False).values()
    }


SCHEMAS = {
    "compress": "lagkv::compress(Tensor key, Tensor value, SymInt start, SymInt lag_size, SymInt keep, *, float value_weight=1., str score=\"std\", int smooth=1, str budget=\"partition\") -> (Tensor key, Tensor value, Tensor index)",
    "compress_carried": "lagkv::compress_carried(Tensor key, Tensor value, Tensor carried, SymInt start, SymInt lag_size, SymInt keep, *, float value_weight=1., str score=\"std\", int smooth=1) -> (Tensor key, Tensor value, Tensor index, Tensor carried)",
    "compress_": "lagkv::compress_(Tensor(a!) key, Tensor(b!) value, SymInt start, SymInt lag_size, SymInt keep, *, float value_weight=1., str score=\"std\", int smooth=1, str budget=\"partition\", Tensor(c!)? scores=None, SymInt sink_size=0) -> Tensor index",
    "partition_bounds": "lagkv::partition_bounds(Tensor x, SymInt start, SymInt lag_size) -> Tensor",
    "lag_score": "lagkv::lag_score(Tensor key, Tensor value, SymInt start, SymInt lag_size, *, float value_weight=1., str score=\"std\", int smooth=1) -> Tensor",
    "topk_index": "lagkv::topk_index(Tensor score, SymInt keep) -> Tensor",
    "compact": "lagkv::compact(Tensor x, Tensor index) -> Tensor",
    "compress_ragged_": "lagkv::compress_ragged_(Tensor(a!) key, Tensor(b!) value, Tensor(c!) start, Tensor(d!) length, SymInt lag_size, SymInt keep, *, float value_weight=1., str score=\"std\", int smooth=1, str budget=\"partition\", Tensor(e!)? scores=None, SymInt sink_size=0) -> Tensor index",
    "compress_varlen": "lagkv::compress_varlen(Tensor key, Tensor value, Tensor cu_seqlens, Tensor start, SymInt lag_size, SymInt keep, *, float value_weight=1., str score=\"std\", int smooth=1, str budget=\"partition\") -> (Tensor key, Tensor value, Tensor index, Tensor cu_seqlens, Tensor start)",
    "compress_paged_": "lagkv::compress_paged_(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor block_table, Tensor(c!) start, Tensor(d!) length, SymInt lag_size, SymInt keep, *, float value_weight=1., str score=\"std\", int smooth=1, str budget=\"partition\", Tensor(e!)? scores=None, SymInt sink_size=0) -> Tensor index",
    "compress_blocks": "lagkv::compress_blocks(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor source_table, Tensor target_table, Tensor m_before, Tensor m_after, SymInt sink_size, SymInt lag_size, SymInt keep, *, float value_weight=1., str score=\"std\", int smooth=1) -> Tensor index",
}  # fmt: skip


@pytest.mark.parametrize("op", SCHEMAS)
def test_schema_is_the_specified_one(op):
    assert str(getattr(torch.ops.lagkv, op).default._schema) == SCHEMAS[op]


def test_instruction_set_can_be_chosen():
    running = torch.ops.lagkv._cpu_isa()
    with cpu_isa("portable"):
        assert torch.ops.lagkv._cpu_isa() == "portable"
    assert torch.ops.lagkv._cpu_isa() == running
