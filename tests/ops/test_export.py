"""``torch.export`` with a dynamic length, and AOTInductor: a program without Python sources that runs at any length."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn

LENGTHS = (40, 5, 19, 20, 21, 35, 36, 37, 52, 100, 333)


class Compress(nn.Module):
    """Compresses and uses every output; in place as well."""

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        new_key, new_value, index = torch.ops.lagkv.compress(key, value, 4, 16, 4, score="std")
        copies = key.clone(), value.clone()
        rows = torch.ops.lagkv.compress_(*copies, 4, 16, 4).shape[2]
        # Not a slice: export would ask whether it is all of the tensor, and accept one answer only.
        first = torch.arange(rows, dtype=torch.int32, device=key.device).expand(*key.shape[:2], rows)
        return new_key + 1, new_value, index, *(torch.ops.lagkv.compact(x, first) for x in copies)


def pair(length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(1, 2, length, 8, generator=generator), torch.randn(
        1, 2, length, 6, generator=generator
    )


def exported() -> torch.export.ExportedProgram:
    length = torch.export.Dim("length", min=2, max=1 << 20)
    return torch.export.export(
        Compress(), pair(40), dynamic_shapes={"key": {2: length}, "value": {2: length}}
    )


def assert_runs(program) -> None:
    for length in LENGTHS:
        expected = Compress()(*pair(length))
        for actual, eager in zip(program(*pair(length)), expected, strict=True):
            torch.testing.assert_close(actual, eager, rtol=0, atol=0)


def test_exported_program_runs_at_any_length():
    program = exported()
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "lagkv.compress.default" in targets
    assert_runs(program.module())


def test_exported_program_survives_saving(tmp_path):
    torch.export.save(exported(), tmp_path / "compress.pt2")
    assert_runs(torch.export.load(tmp_path / "compress.pt2").module())


def test_decompositions_keep_the_operators():
    program = exported().run_decompositions()
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "lagkv.compress.default" in targets
    assert_runs(program.module())


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++")
def test_aot_inductor_package_runs_at_any_length(tmp_path):
    path = torch._inductor.aoti_compile_and_package(exported(), package_path=str(tmp_path / "compress.pt2"))
    assert_runs(torch._inductor.aoti_load_package(path))
