"""The Python blocks of README.md and docs/operators.md run as they stand, in order; the README fits on one screen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lagkv_ext

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATORS = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
BLOCKS = [
    block for page in (README, OPERATORS) for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
]


def test_there_are_five() -> None:
    assert len(BLOCKS) == 5


def test_the_readme_is_one_screen_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 130
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        links = re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
        for link in links:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_operator() -> None:
    scope: dict = {}
    exec(BLOCKS[0], scope)
    assert f"# {list(scope['out'].key.shape)}" in BLOCKS[0]


def test_compiled_module() -> None:
    scope = {"torch": torch, "lagkv_ext": lagkv_ext}
    exec(BLOCKS[1], scope)
    for length in (200, 300, 1000):
        query, key, value = (torch.randn(1, 2, n, 32) for n in (1, length, length))
        result = scope["attention"](query, key, value)
        torch.testing.assert_close(result, scope["CompressedAttention"]()(query, key, value))


def test_generate(capsys: pytest.CaptureFixture) -> None:
    transformers = pytest.importorskip("transformers", reason="the cache needs transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    scope = {
        "model": transformers.LlamaForCausalLM(config).eval(),
        "inputs": {"input_ids": torch.randint(3, 64, (1, 600)), "attention_mask": torch.ones(1, 600).long()},
    }
    exec(BLOCKS[2], scope)
    assert all(layer.compressions > 0 for layer in scope["cache"].report().layers)
    assert capsys.readouterr().out.strip()


def test_equivalent_to() -> None:
    key, value = torch.randn(2, 3, 100, 16), torch.randn(2, 3, 100, 8)
    scope = {
        "torch": torch,
        "key": key,
        "value": value,
        "start": 4,
        "P": 12,
        "L": 8,
        "keep": 3,
        "value_weight": 0.5,
    }
    exec(BLOCKS[3], scope)
    score = torch.ops.lagkv.lag_score(key, value, 4, 8, value_weight=0.5)
    torch.testing.assert_close(scope["score"], score)
    assert torch.equal(scope["kept"].int(), torch.ops.lagkv.topk_index(score, 3))


def test_ragged_equivalent_to() -> None:
    states = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        key, value = (torch.randn(3, 2, 100, dim, generator=generator) for dim in (16, 8))
        start, length = (torch.tensor(n, dtype=torch.int32) for n in ([4, 4, 0], [100, 7, 33]))
        states.append({"key": key, "value": value, "start": start, "length": length})
    scope = {"lagkv_ext": lagkv_ext, "L": 8, "keep": 3, **states[0]}
    exec(BLOCKS[4], scope)
    torch.ops.lagkv.compress_ragged_(*states[1].values(), 8, 3)
    for name in ("start", "length"):
        assert torch.equal(states[0][name], states[1][name])
    for b, rows in enumerate(states[0]["length"].tolist()):
        for name in ("key", "value"):
            assert torch.equal(states[0][name][b, :, :rows], states[1][name][b, :, :rows])
