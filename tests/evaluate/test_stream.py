"""Contexts read in pieces: the same as the cache that is deployed, token by token or in chunks, alone or in a batch."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("transformers")

from lagkv_ext import LagKVCache, output_length
from lagkv_ext.cache.fidelity import forward
from lagkv_ext.commands.evaluate import methods
from lagkv_ext.commands.evaluate.stream import pieces, read_in_pieces
from lagkv_ext.commands.evaluate.types import Setting
from tests.evaluate import tiny_models

LAYERS = [1, 2]
SIZES = {"sink_size": 4, "lag_size": 16}


def text(tokens: int) -> torch.Tensor:
    return torch.randint(2, 90, (1, tokens), generator=torch.Generator().manual_seed(5))


def stream(names, ids, cuts):
    torch.set_num_threads(1)
    made = [
        (
            methods.resolve(n),
            functools.partial(methods.layer_of, Setting(n, 0.25, **SIZES), prompt="", seed=0),
        )
        for n in names
    ]
    return read_in_pieces(tiny_models.model(), ids, dict.fromkeys(LAYERS, made), cuts)


@pytest.mark.parametrize("chunk", [7, 16, 40, "decode", 1])
@pytest.mark.parametrize("score", ["std", "cosine"])
def test_pieces_are_what_the_deployed_cache_does(chunk, score):
    ids = text(130)
    cuts = list(pieces(130, chunk, **SIZES))
    cache = stream([f"lagkv-{score}"], ids, iter(cuts))
    deployed = LagKVCache(tiny_models.model().config, keep_ratio=0.25, score=score, **SIZES)
    with torch.inference_mode():
        # Decoding is one token at a time there, and fewer passes here.
        steps = [(i, i + 1) for i in range(130)] if chunk == "decode" else cuts
        for begin, end in steps:
            forward(tiny_models.model(), ids[:, begin:end], deployed, position=begin, logits_to_keep=1)
    for i in LAYERS:
        assert cache.layers[i].keys.shape[2] == output_length(130, 4, 16, 4)
        assert torch.allclose(cache.layers[i].keys, deployed.layers[i].keys, atol=1e-4)
        assert torch.allclose(cache.layers[i].values, deployed.layers[i].values, atol=1e-4)


def test_one_piece_is_one_shot():
    ids = text(130)
    full = stream(["window"], ids[:, :20], iter([(0, 20)]))  # too short to be compressed
    assert full.layers[1].keys.shape[2] == 20
    names = ["lagkv-blend-smooth3-head", "keydiff", "random", "window", "lagkv-std-v"]
    together = stream(names, ids, pieces(130, 130, **SIZES))
    from lagkv_ext.commands.evaluate.prefill import read

    prefill = read(tiny_models.model(), ids, LAYERS)
    for b, name in enumerate(names):
        for i in LAYERS:
            key, value = prefill.rows(i)
            layer = methods.layer_of(Setting(name, 0.25, **SIZES), key, value, layer=i, prompt="", seed=0)
            index = methods.select(methods.resolve(name), layer)[0, :, :, None].long()
            if name == "random":
                continue  # drawn by layer number, which these layers do not have
            assert torch.allclose(
                together.layers[i].keys[b], key[0].gather(1, index.expand(-1, -1, 8)), atol=1e-4
            )


@pytest.mark.parametrize("chunk", [16, 40, "decode"])
def test_sequences_of_a_batch_do_not_know_each_other(chunk):
    ids, names = text(120), ["lagkv-blend-smooth3-head", "lagkv-blend", "lagkv-std-head", "keydiff"]
    together = stream(names, ids, pieces(120, chunk, **SIZES))
    for b, name in enumerate(names):
        alone = stream([name], ids, pieces(120, chunk, **SIZES))
        for i in LAYERS:
            assert torch.allclose(together.layers[i].keys[b], alone.layers[i].keys[0], atol=1e-4), name


@pytest.mark.parametrize(
    ("tokens", "chunk", "expected"),
    [
        (10, "decode", [(0, 10)]),
        (36, "decode", [(0, 36)]),
        (37, "decode", [(0, 36), (36, 37)]),
        (70, "decode", [(0, 36), (36, 52), (52, 68), (68, 70)]),
        (10, 4, [(0, 4), (4, 8), (8, 10)]),
        (8, 4, [(0, 4), (4, 8)]),
    ],
)
def test_edges(tokens, chunk, expected):
    assert list(pieces(tokens, chunk, **SIZES)) == expected
