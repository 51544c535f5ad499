"""The Python blocks of the pages run as they stand; the README fits on one screen and its links lead somewhere."""

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


#: Python blocks of each page, and the tests that run them; those of README.md and docs/operators.md are `BLOCKS`.
RUN_BY = {
    "README.md": (3, ["tests/tools/test_readme.py"]),
    "docs/operators.md": (3, ["tests/tools/test_readme.py"]),
    "docs/quality.md": (1, ["tests/tools/test_readme.py"]),
    "docs/operations.md": (5, ["tests/serving/test_operations_page.py", "tests/vllm/test_server.py"]),
}


def test_every_block_is_run_by_a_test() -> None:
    """A new block is added here together with the test that runs it."""
    found = {}
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")):
        if count := len(re.findall(r"^```python$", page.read_text(encoding="utf-8"), re.MULTILINE)):
            found[str(page.relative_to(ROOT))] = count
    assert found == {page: count for page, (count, _) in RUN_BY.items()}
    assert all((ROOT / test).exists() for _, tests in RUN_BY.values() for test in tests)


def test_settings_of_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="the cache needs transformers")
    from tests.cache.models import tiny_model

    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("lagkv.json").write_text('{"lag_size": 8, "keep": 3}')
    scope = {"model": tiny_model("llama"), "lagkv_ext": lagkv_ext, "LagKVCache": lagkv_ext.LagKVCache}
    exec(block, scope)
    assert {layer.settings.keep for layer in scope["cache"].layers} == {3}


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


def test_carried_scores() -> None:
    key, value = torch.randn(2, 3, 100, 16), torch.randn(2, 3, 100, 8)
    before = key.clone()
    scope = {
        "lagkv_ext": lagkv_ext,
        "key": key,
        "value": value,
        "carried": torch.randn(2, 3, 6),
        "L": 8,
        "keep": 3,
    }
    exec(BLOCKS[4], scope := scope | {"start": 10, "scores": torch.full((2, 3, 100), torch.nan)})
    out = scope["out"]
    assert torch.equal(out.key, lagkv_ext.compact(before, out.index))
    assert torch.equal(key[:, :, : out.key.shape[2]], out.key)
    assert torch.equal(scope["scores"][:, :, 4 : scope["start"]], out.carried)


def test_ragged_equivalent_to() -> None:
    states = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        key, value = (torch.randn(3, 2, 100, dim, generator=generator) for dim in (16, 8))
        start, length = (torch.tensor(n, dtype=torch.int32) for n in ([4, 4, 0], [100, 7, 33]))
        states.append({"key": key, "value": value, "start": start, "length": length})
    scope = {"lagkv_ext": lagkv_ext, "L": 8, "keep": 3, **states[0]}
    exec(BLOCKS[5], scope)
    torch.ops.lagkv.compress_ragged_(*states[1].values(), 8, 3)
    for name in ("start", "length"):
        assert torch.equal(states[0][name], states[1][name])
    for b, rows in enumerate(states[0]["length"].tolist()):
        for name in ("key", "value"):
            assert torch.equal(states[0][name][b, :, :rows], states[1][name][b, :, :rows])
