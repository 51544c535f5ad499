"""`lagkv explain`: what it says of every token against the operators and the cache; the page in a browser."""

from __future__ import annotations

import base64
import copy
import dataclasses
import functools
import hashlib
import html as markup
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers", reason="explain needs transformers")
pytest.importorskip("jinja2", reason="explain needs jinja2")
pytest.importorskip("typer", reason="the command needs typer")

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from typer.testing import CliRunner

import lagkv_ext
from lagkv_ext import LagKVCache, reference
from lagkv_ext.cache.fidelity import forward
from lagkv_ext.cache.keyword import cache_argument
from lagkv_ext.commands import cli, models
from lagkv_ext.commands.explain import (
    ExplainError,
    Explanation,
    Layer,
    Tokens,
    explain,
    explain_saved,
    html,
    page,
)
from lagkv_ext.commands.explain.explanation import array_json, array_of
from lagkv_ext.commands.explain.recorder import LayerRecord, RecordedCache, Recorder
from lagkv_ext.commands.explain.tokens import tokenize
from tests import browser
from tests.cache import tiny_model
from tests.evaluate import tiny_models

FULL_LAYERS = (1, 2)
TEXT = "The quick brown fox jumps over the lazy dog. " * 4  # 181 tokens with <bos>: one a character
SMALL = {"lag_size": 16, "sink_size": 4, "keep_ratio": 0.25}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def settings_and_chunk(draw):
    lag, sink = draw(st.integers(3, 16)), draw(st.integers(0, 6))
    keep = draw(st.integers(1, lag - 1))
    given = {
        "lag_size": lag,
        "sink_size": sink,
        "keep": keep,
        "score": draw(st.sampled_from(["std", "cosine"])),
        "value_weight": draw(st.sampled_from([0.0, 1.0, -0.5])),
        "max_tokens": draw(st.none() | st.integers(sink + 2 * lag, 80)),
        "quantization": draw(st.sampled_from([None, None, "int8"])),
    }
    if draw(st.booleans()) and given["max_tokens"] is None:
        given.update(draw(st.sampled_from([{"layer_keep_ratio": {1: 0.9}}, {"skip_layers": [2]}])))
    return given, draw(st.sampled_from([None, 1, 7, 50]))


class TestRecords:
    @given(settings_and_chunk())
    def test_it_is_what_the_cache_keeps(self, drawn):
        """Whatever the settings and the chunks: the tokens of the cache, and ranks that say which they are."""
        settings, chunk = drawn
        text = TEXT[:50] if chunk == 1 else TEXT[:120]
        found = explain(tiny_models.loaded(), text, settings, chunk=chunk)
        model, ids = tiny_models.model(), torch.tensor([found.tokens.ids])
        cache = LagKVCache(model.config, **settings)
        step = chunk or ids.shape[1]
        with torch.inference_mode():
            for begin in range(0, ids.shape[1], step):
                forward(model, ids[:, begin : begin + step], cache, position=begin, logits_to_keep=1)
        assert [x.index for x in found.layers] == list(FULL_LAYERS)
        for layer in found.layers:
            positions = cache.kept_positions(layer.index)[0].long()
            expected = torch.zeros(layer.heads, found.tokens_seen, dtype=torch.bool).scatter_(
                1, positions, True
            )
            assert np.array_equal(layer.kept, expected.numpy())
            assert layer.settings["keep"] == cache.layers[layer.index].settings.keep
            assert layer.compressions == cache.layers[layer.index].compressions
            keep, lag = layer.settings["keep"], layer.settings["lag_size"]
            scored = layer.rank > 0
            # A token is dropped where it was ranked too low, and only there.
            assert np.array_equal(~layer.kept, layer.rank > keep)
            assert np.array_equal(layer.compared, np.where(scored, lag, 0))
            assert np.array_equal(np.isnan(layer.score), ~scored)
            assert not scored[:, : layer.sink].any()
            assert not scored[:, layer.window :].any()
            if layer.compressions:
                assert scored[:, layer.sink : layer.window].all()
                assert layer.sink == settings["sink_size"]

    @pytest.mark.parametrize("score", ["std", "cosine"])
    def test_in_one_piece_it_is_the_reference(self, score):
        found = explain(tiny_models.loaded(), TEXT, {**SMALL, "score": score})
        model, full = tiny_models.model(), DynamicCache(config=tiny_models.model().config)
        with torch.inference_mode():
            model(torch.tensor([found.tokens.ids]), **cache_argument(full))
        for layer in found.layers:
            key, value = full.layers[layer.index].keys, full.layers[layer.index].values
            scores = reference.lag_score(key, value, 4, 16, score=score)[0].flatten(1)
            inside = slice(layer.sink, layer.window)
            torch.testing.assert_close(torch.from_numpy(layer.score[:, inside]), scores, rtol=1e-4, atol=1e-5)
            higher = scores.unflatten(1, (-1, 16)).unsqueeze(-1) < scores.unflatten(1, (-1, 16)).unsqueeze(-2)
            assert np.array_equal(layer.rank[:, inside], higher.sum(dim=-1).flatten(1).numpy() + 1)

    def test_a_token_has_its_last_comparison(self):
        """A token budget compares what was kept again: the ranks are those of the compression that decided last."""
        found = explain(tiny_models.loaded(), TEXT, {**SMALL, "max_tokens": 60}, chunk=16)
        layer = found.layers[0]
        assert layer.compressions > 5
        assert (~layer.kept[:, 20:100]).sum() > 80 * 2 * 0.8  # more than one comparison would drop
        assert np.array_equal(~layer.kept, layer.rank > 4)

    def test_an_unknown_operator_is_an_error(self):
        with (
            Recorder(),
            pytest.raises(RuntimeError, match="does not know the operator lagkv::partition_bounds"),
        ):
            torch.ops.lagkv.partition_bounds(torch.rand(1, 1, 20, 8), 0, 8)

    @given(
        st.sampled_from([{}, {"smooth": 3}, {"score": "blend"}]),
        st.none() | st.integers(40, 90),
        st.sampled_from([None, 7, 50]),
        st.sampled_from([None, "int8"]),
    )
    def test_a_shared_budget_and_what_it_sheds(self, options, max_tokens, chunk, quantization):
        """Rows that carry their scores compete again; a full cache sheds the lowest besides."""
        settings = {
            **SMALL,
            **options,
            "budget": "head",
            "max_tokens": max_tokens,
            "quantization": quantization,
        }
        found = explain(tiny_models.loaded(), TEXT, settings, chunk=chunk)
        model, ids = tiny_models.model(), torch.tensor([found.tokens.ids])
        cache, step = LagKVCache(model.config, **settings), chunk or ids.shape[1]
        with torch.inference_mode():
            for begin in range(0, ids.shape[1], step):
                forward(model, ids[:, begin : begin + step], cache, position=begin, logits_to_keep=1)
        for layer in found.layers:
            held = cache.kept_positions(layer.index)[0].long()
            assert np.array_equal(np.flatnonzero(layer.kept[0]), held[0].numpy())
            between = slice(layer.sink, layer.window)
            assert (layer.rank[:, between] > 0).all()
            assert (layer.compared[:, between] >= layer.rank[:, between]).all()

    @given(
        st.sampled_from(["partition", "head"]),
        st.sampled_from(["std", "cosine", "blend"]),
        st.sampled_from([1, 3]),
        st.lists(st.integers(0, 40), min_size=1, max_size=5),
        st.integers(0, 1000),
    )
    def test_every_way_to_choose(self, budget, score, smooth, pieces, seed):
        """Against the reference, recursively: shared budgets carry the scores of the rows kept before."""
        sink, lag, keep = 2, 6, 2
        torch.manual_seed(seed)
        key, value = torch.randn(2, 1, 2, 0, 4)
        carried, start, seen, record = torch.empty(1, 2, 0), sink, 0, LayerRecord(2)
        positions = torch.empty(2, 0, dtype=torch.long)
        options = {"score": score, "smooth": smooth}
        for new in pieces:
            rows = torch.randn(2, 1, 2, new, 4).round(decimals=1 if seed % 2 else 6)  # ties in some
            key, value = torch.cat([key, rows[0]], dim=2), torch.cat([value, rows[1]], dim=2)
            positions = torch.cat([positions, torch.arange(seen, seen + new).expand(2, new)], dim=1)
            seen += new
            scores = reference.lag_score(key, value, start, lag, **options)
            if scores.shape[2] == 0:
                continue
            arguments = {"key": key, "start": start, "keep": keep, **options}
            if budget == "head":
                arguments["carried"] = carried
                key, value, index, carried = reference.compress_carried(
                    key, value, carried, start, lag, keep, **options
                )
            else:
                key, value, index = reference.compress(key, value, start, lag, keep, **options)
            record.add(arguments, scores, index)
            positions = positions.gather(1, index[0].long())
            start += keep * scores.shape[2]
            assert torch.equal(record.held, positions)
            assert record.seen == seen
            if budget == "head":
                assert torch.equal(record.scores[:, sink:start], carried[0])
                assert record.comparisons[-1].rivals == start - sink + (lag - keep) * scores.shape[2]
            else:
                assert record.comparisons[-1].rivals == lag

    def test_other_choices_than_the_scores_are_an_error(self):
        key, value = torch.randn(2, 1, 2, 40, 8)
        arguments = {"key": key, "start": 4, "keep": 2}
        scores = reference.lag_score(key, value, 4, 8)
        index = reference.compress(key, value, 4, 8, 2)[2]
        LayerRecord(2).add(arguments, scores, index)
        with pytest.raises(RuntimeError, match="did not keep the highest scores"):
            LayerRecord(2).add(arguments, -scores, index)

    def test_another_cache_than_recorded_is_an_error(self):
        model = tiny_models.model()
        cache = RecordedCache(model.config, **SMALL)
        with torch.inference_mode():
            forward(model, torch.full((1, 60), 5), cache, position=0, logits_to_keep=1)
            assert cache.recorded()
            cache.recorder.records.clear()
            with pytest.raises(RuntimeError, match="layer 1 holds other tokens"):
                cache.recorded()

    def test_nan_is_shown_as_such(self):
        broken = copy.deepcopy(tiny_models.model())
        broken.model.layers[2].self_attn.v_proj.weight.data[0, 0] = float("nan")
        loaded = SimpleNamespace(**{**vars(tiny_models.loaded()), "model": broken})
        found = explain(loaded, TEXT, SMALL)
        layer = found.layers[1]
        assert layer.nan_scores() > 0
        assert np.isnan(layer.score[0, layer.sink : layer.window]).all()
        assert (layer.rank[0, layer.sink : layer.window].reshape(-1, 16) == np.arange(1, 17)).all()
        assert any("came out as NaN" in note for note in found.notes())
        assert "came out as NaN" in html(found)


class TestBadInput:
    @pytest.mark.parametrize("count", [2, 3, 35])
    def test_short_texts_lose_nothing_and_say_so(self, count):
        found = explain(tiny_models.loaded(), "x" * (count - 1), SMALL)
        assert found.share().min() == 1.0
        assert found.layers[0].sink == min(4, count)
        assert f"Nothing was dropped of {count} tokens: nothing is compressed below" in found.notes()[0]
        assert "sink_size + 2 * lag_size = 36" in found.notes()[0]
        assert not any("NaN" in note for note in found.notes())

    def test_settings_that_keep_everything(self):
        found = explain(tiny_models.loaded(), TEXT, {"keep_ratio": 1.0})
        assert (
            found.notes()[0]
            == "Nothing was dropped of 181 tokens: the settings keep every token of each partition."
        )

    def test_errors_name_the_cause(self):
        loaded = tiny_models.loaded()
        with pytest.raises(ExplainError, match="the text is empty"):
            explain(loaded, "")
        with pytest.raises(ExplainError, match="181 tokens, and the model's context is 100 tokens"):
            explain(tiny_models.loaded(limit=100), TEXT)
        with pytest.raises(ExplainError, match="cannot be made for tiny: lag_size must be at least 1"):
            explain(loaded, TEXT, {"lag_size": 0})
        with pytest.raises(ExplainError, match="chunk must be at least 1"):
            explain(loaded, TEXT, chunk=0)
        config = tiny_model.model(["sliding_attention"]).config
        none = SimpleNamespace(**{**vars(loaded), "model": SimpleNamespace(config=config)})
        with pytest.raises(ExplainError, match="no full-attention layer"):
            explain(none, TEXT)

    def test_unknown_tokens_are_counted(self):
        found = explain(tiny_models.loaded(), "abc é ü xyz", SMALL)
        assert found.tokens.unknown == (5, 7)
        assert "".join(found.tokens.pieces[1:]) == "abc é ü xyz"
        assert "2 of 12 tokens stand for text that the tokenizer does not know." in found.notes()


@functools.cache
def byte_tokenizer() -> Any:
    """Tokens are bytes and a few merges: a character is often several tokens, as in GPT's and Llama's vocabularies."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat 😀 שלום 你好 " * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


ODD = "<b>&amp;</script> 😀 👩\u200d👩\u200d👧 e\u0301 שלום \u202eabc\u202c 你好\u200b\x00\x07\n\n\tनमस्ते"


class TestTokens:
    @given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30) | st.just(ODD))
    def test_pieces_are_the_text(self, text):
        for tokenizer in (byte_tokenizer(), tiny_models.tokenizer()):
            tokens = tokenize(tokenizer, text)
            names = [i not in tokens.special for i in range(len(tokens.ids))]
            whole = "".join(
                tokens.between.get(i, "") + (tokens.pieces[i] if names[i] else "")
                for i in range(len(tokens.ids))
            ) + tokens.between.get(len(tokens.ids), "")
            assert whole == text
            assert all(tokens.pieces[i] or i in tokens.parts for i in range(len(tokens.ids)))

    def test_parts_of_a_character(self):
        tokens = tokenize(byte_tokenizer(), "a\U0001d518b")
        assert tokens.pieces == ("a", "\U0001d518", "", "", "", "b")
        assert tokens.parts == (1, 2, 3, 4)

    def test_special_tokens_have_their_names(self):
        tokens = tokenize(tiny_models.tokenizer(), "ab")
        assert (tokens.pieces, tokens.special) == (("<bos>", "a", "b"), (0,))

    def test_text_without_a_token_is_not_lost(self):
        tokens = tokenize(tiny_model.tokenizer(), " the  moon ")
        assert (tokens.pieces, tokens.between) == (("<bos>", "the", "moon"), {1: " ", 2: "  ", 3: " "})


@functools.cache
def small() -> Explanation:
    return explain(tiny_models.loaded(), TEXT, {**SMALL, "layer_keep_ratio": {1: 0.5}}, chunk=50)


class TestJson:
    def test_it_is_read_back(self):
        for found in (small(), explain(tiny_models.loaded(), "short")):
            data = json.loads(json.dumps(found.to_json()))
            again = Explanation.from_json(data)
            assert again.to_json() == data
            for a, b in zip(found.layers, again.layers, strict=True):
                for name in ("kept", "score", "rank", "compared"):
                    np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
            assert again.tokens == found.tokens

    def test_its_schema(self):
        """Fields that docs/operations.md describes."""
        data = small().to_json()
        assert (data["format"], data["version"]) == ("lagkv_ext.explanation", 1)
        assert list(data) == [
            "format", "version", "model", "source", "arguments", "chunk", "tokens_seen", "tokens", "uncompressed",
            "notes", "layers",
        ]  # fmt: skip
        layer = data["layers"][0]
        assert list(layer) == [
            "index", "settings", "heads", "compressions", "sink", "window", "kept", "score", "rank", "compared",
        ]  # fmt: skip
        assert (layer["kept"]["dtype"], layer["kept"]["shape"]) == ("bits", [2, 181])
        assert layer["score"]["dtype"] == "float32"
        assert data["arguments"]["layer_keep_ratio"] == {"1": 0.5}
        assert list(data["tokens"]) == ["ids", "pieces", "special", "unknown", "parts", "between"]

    @given(st.integers(0, 3), st.integers(0, 40), st.randoms(use_true_random=False))
    def test_arrays(self, rows, columns, random):
        bits = np.asarray([[random.random() < 0.5 for _ in range(columns)] for _ in range(rows)], dtype=bool)
        bits = bits.reshape(rows, columns)
        assert np.array_equal(array_of(array_json(bits)), bits)
        values = bits.astype(np.float32) / 3
        assert np.array_equal(array_of(array_json(values)), values)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x: x.update(format="other"), "no explanation of lagkv_ext"),
            (lambda x: x.update(version=2), "has version 2, this library reads 1"),
            (lambda x: x.pop("tokens_seen"), "damaged: 'tokens_seen'"),
            (lambda x: x["layers"][0]["kept"].update(base64="AAAA"), "damaged"),
            (lambda x: x["layers"][0]["kept"].update(base64="?"), "damaged"),
            (lambda x: x.update(layers=3), "damaged"),
        ],
    )
    def test_damaged_files(self, change, message):
        data = json.loads(json.dumps(small().to_json()))
        change(data)
        with pytest.raises(ExplainError, match=message):
            Explanation.from_json(data)
        with pytest.raises(ExplainError, match="no explanation"):
            Explanation.from_json([])

    def test_share(self):
        found = small()
        kept = np.concatenate([x.kept for x in found.layers])
        np.testing.assert_allclose(found.share(), kept.mean(axis=0))
        np.testing.assert_allclose(found.share(2), found.layers[1].kept.mean(axis=0))
        with pytest.raises(ValueError, match=r"layer must be one of \[1, 2\], got 0"):
            found.share(0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A cache that has read two sequences, and went on for three tokens."""
    model = tiny_models.model()
    cache = LagKVCache(model.config, **SMALL, quantization="int8")
    ids = torch.tensor([tokenize(tiny_models.tokenizer(), TEXT).ids])
    with torch.inference_mode():
        forward(model, torch.cat([ids, ids.roll(5)]), cache, position=0, logits_to_keep=1)
        forward(model, torch.tensor([[5, 6, 7], [8, 9, 10]]), cache, position=181, logits_to_keep=1)
    path = tmp_path_factory.mktemp("saved") / "cache.safetensors"
    cache.save(path)
    return path, cache


class TestSaved:
    @pytest.mark.parametrize("sequence", [0, 1])
    def test_it_shows_what_is_held(self, saved, sequence):
        path, cache = saved
        found = explain_saved(path, tiny_models.model().config, model="tiny", sequence=sequence)
        assert (found.source, found.tokens_seen, found.tokens) == ("saved cache", 184, None)
        for layer in found.layers:
            positions = cache.kept_positions(layer.index, sequence)
            assert [np.flatnonzero(x).tolist() for x in layer.kept] == positions.tolist()
            assert layer.score is layer.rank is layer.compared is None
            assert layer.kept[:, layer.window :].all()
            assert not layer.kept[:, layer.window - 16 : layer.window].all()
            assert layer.settings["quantization"] == "int8"
        assert "not their scores and ranks, nor the text" in found.notes()[0]
        assert Explanation.from_json(json.loads(json.dumps(found.to_json()))).to_json() == found.to_json()

    def test_with_its_text(self, saved):
        path, _ = saved
        tokens = tokenize(tiny_models.tokenizer(), TEXT)
        found = explain_saved(path, tiny_models.model().config, tokens=tokens)
        assert "The text has 181 tokens and the cache has seen 184" in " ".join(found.notes())
        assert "nothing tells whether it is the right one" in " ".join(found.notes())
        longer = tokenize(tiny_models.tokenizer(), TEXT * 2)
        with pytest.raises(ExplainError, match=r"361 tokens, and the cache in .* has seen 184"):
            explain_saved(path, tiny_models.model().config, tokens=longer)

    def test_bad_files(self, saved, tmp_path):
        path, _ = saved
        config = tiny_models.model().config
        with pytest.raises(ExplainError, match="there is no file"):
            explain_saved(tmp_path / "none", config)
        with pytest.raises(ExplainError, match="2 sequences, numbered from 0; there is no sequence 2"):
            explain_saved(path, config, sequence=2)
        data = path.read_bytes()
        for damaged in (b"", data[: len(data) // 2], b"text" * 100):
            (tmp_path / "bad").write_bytes(damaged)
            with pytest.raises(ExplainError, match="damaged"):
                explain_saved(tmp_path / "bad", config)
        with pytest.raises(ExplainError, match="another model"):
            explain_saved(path, tiny_model.model().config)
        empty = tmp_path / "empty"
        LagKVCache(config).save(empty)
        with pytest.raises(ExplainError, match="cache of no tokens"):
            explain_saved(empty, config)


# Tokens that are markup as a whole.
MARKUP = (
    "<b>bold</b>",
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "<!--",
    "&amp;",
)


@functools.cache
def odd() -> Explanation:
    """A text of everything that needs care, as a tokenizer of bytes cuts it, and tokens that are markup."""
    tokens = tokenize(byte_tokenizer(), ODD * 4)
    tokens = dataclasses.replace(
        tokens, ids=(*tokens.ids, *range(len(MARKUP))), pieces=(*tokens.pieces, *MARKUP)
    )
    count = len(tokens.ids)
    rng = np.random.default_rng(0)
    rank = np.zeros((2, count), np.int32)
    rank[:, 4:-20] = rng.integers(1, 9, (2, count - 24))
    kept = rank < 3
    score = np.where(rank > 0, rank / 10, np.nan).astype(np.float32)
    layer = Layer(
        3, {"lag_size": 8, "keep": 2, "sink_size": 4}, 1, 4, count - 20, kept, score, rank, 8 * (rank > 0)
    )
    return Explanation("<i>m</i>", "model", count, (layer,), tokens)


class TestPage:
    def test_no_reference_leaves_the_file(self):
        for found in (small(), odd()):
            text = html(found)
            links = browser.Links(text)
            assert all(x.startswith("data:") for x in links.found)
            assert not re.search(r"url\(|@import|https?://", text)
            assert links.tags.count("script") == 2  # the data, and the page's own
            assert not {"b", "i"} & set(re.findall(r"<(\w+)>", text.partition("<header>")[2])) - {"b"}
            assert "<i>m</i>" not in text

    def test_only_its_own_script_may_run(self):
        text = html(odd())
        policy = markup.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
        assert policy.startswith("default-src 'none'; img-src data:; ")
        for tag in ("style", "script"):
            content = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
            assert len(content) == 1
            digest = base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy

    def test_the_data_are_the_text(self):
        text = html(odd())
        data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
        assert "".join(data["tokens"]["pieces"]) == ODD * 4 + "".join(MARKUP)

    @pytest.mark.parametrize("anchors", [page.LIGHT, page.DARK])
    def test_text_stands_out_from_every_shade(self, anchors):
        colours = page.palette(anchors)
        assert len(colours) == 11
        for background, ink in colours:
            assert page.contrast(background, ink) >= 4.5
        dropped = re.findall(r"--k0: (#\w+); --t0: (#\w+);", page.palette_css())
        assert len(dropped) == 2
        assert all(page.contrast(*pair) >= 4.5 for pair in dropped)
        # Lightness goes one way, so the order is seen without telling colours apart.
        lightness = [page.contrast(colours[0][0], background) for background, _ in colours]
        assert lightness == sorted(lightness)

    def test_layers_with_equal_settings_share_a_row(self):
        assert page._runs([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7, 8"
        rows, columns = page._settings(small().layers)
        assert [x["layers"] for x in rows] == ["1", "2"]
        assert [x["settings"][columns.index("keep")] for x in rows] == ["8", "4"]

    def test_scores_in_two_bytes(self):
        values = np.asarray([0.0, 1.0, -2.5, 0.0078125, 1e-30, 3e38, np.inf, -np.inf], dtype=np.float32)
        again = (page._upper_half(values).astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_allclose(again, values, rtol=2**-8)
        random = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
        again = (page._upper_half(random).astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_allclose(again, random, rtol=2**-8)
        assert np.isnan(
            (page._upper_half(np.asarray([np.nan], np.float32)).astype(np.uint32) << 16).view(np.float32)
        )

    def test_large_ones_have_layers_in_place_of_heads(self):
        found = small()
        values = sum(x.kept.size for x in found.layers)
        assert page.page_data(found, values)["detail"] == "heads"
        data = page.page_data(found, values - 1)
        assert data["detail"] == "layers"
        for layer, shown in zip(found.layers, data["layers"], strict=True):
            inside = slice(layer.sink, layer.window)
            rank, best = array_of(shown["rank"]), array_of(shown["best"])
            np.testing.assert_array_equal(best[inside], layer.rank[:, inside].min(axis=0))
            np.testing.assert_array_equal(rank[inside], np.rint(layer.rank[:, inside].mean(axis=0)))
            assert not rank[: layer.sink].any()
            assert not best[layer.window :].any()
            assert shown["compared_all"] == 16


def opened(text: str, folder, script: str = "") -> tuple[str, Any]:
    """The page's document once it is ready, and what ``script`` returned; the console must stay empty.

    The page itself lets no other script run: where there is one, it is opened without its policy.
    """
    if script:
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text, count=1)
        text = text.replace(
            "</body>",
            "<script>addEventListener('load', () => setTimeout(() => {"
            f"const run = () => {{{script}}}; document.title = JSON.stringify(run()); }}, 50));</script></body>",
        )
    document = browser.document_of(text, folder)
    assert 'data-ready="' in document
    title = re.search(r"<title>(.*?)</title>", document)[1]
    return document, json.loads(markup.unescape(title)) if script else None


SCRIPT = """
const text = document.getElementById("text");
const of = (i) => [...text.querySelectorAll("span")].filter((x) => x.token !== undefined)[i];
const all = () => [...text.querySelectorAll("span")].filter((x) => x.token !== undefined).map((x) => x.className);
const choose = (id, index) => {
  const select = document.getElementById(id);
  select.selectedIndex = index;
  select.dispatchEvent(new Event("change"));
};
const key = (name) => text.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
const hover = (i) => {
  of(i).dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX: 50, clientY: 50 }));
  const tip = document.getElementById("tip");
  return [tip.hidden, tip.textContent, document.getElementById("detail").innerText];
};
const out = {};
out.all = all();
out.hover = hover(30);
text.dispatchEvent(new PointerEvent("pointerleave"));
out.left = document.getElementById("tip").hidden;
out.options = [...document.getElementById("layer").options].map((x) => x.textContent);
choose("layer", 2);
out.layer = all();
out.hoverLayer = hover(30);
choose("head", 2);
out.head = all();
out.hoverHead = hover(30);
text.focus();
for (let i = 0; i < 31; i++) key("ArrowRight");
out.current = [...text.querySelectorAll(".current")].map((x) => x.token);
key("ArrowLeft");
out.spoken = document.getElementById("spoken").textContent;
key("End");
out.end = text.querySelector(".current").token;
key("ArrowUp");
out.up = text.querySelector(".current").token;
key("Home");
key("ArrowDown");
out.down = text.querySelector(".current").token;
document.dispatchEvent(new KeyboardEvent("keydown", { key: "[", bubbles: true }));
out.bracket = document.getElementById("layer").selectedIndex;
of(12).click();
out.click = text.querySelector(".current").token;
const before = getComputedStyle(document.body).backgroundColor;
document.getElementById("theme").click();
out.themes = [before, getComputedStyle(document.body).backgroundColor];
const map = document.getElementById("map");
const box = map.getBoundingClientRect();
map.dispatchEvent(new MouseEvent("click", { clientX: box.left + box.width * 0.5, clientY: box.top + 10 }));
out.map = text.querySelector(".current").token;
const pixels = map.getContext("2d").getImageData(0, 0, map.width, map.height).data;
out.colours = new Set(Array.from({ length: pixels.length / 4 }, (_, i) => pixels.slice(4 * i, 4 * i + 3).join())).size;
return out;
"""


def shades(found: Explanation, kept: np.ndarray, sink: int, window: int) -> list[str]:
    share = kept.mean(axis=0)
    steps = np.where(share == 0, 0, np.where(share == 1, 10, np.floor(10 * share + 0.5).clip(1, 9))).astype(
        int
    )
    return [
        f"k{step}"
        + (" sink" if i < sink else " window" if i >= window else "")
        + (" label" if i == 0 else "")
        for i, step in enumerate(steps)
    ]


@browser.needed
def test_the_page_in_a_browser(tmp_path):
    """Shades, hover, layers, heads, keys, themes and the map, against the explanation."""
    found = small()
    _, out = opened(html(found), tmp_path, SCRIPT)
    one, two = found.layers
    assert out["all"] == shades(found, np.concatenate([one.kept, two.kept]), 4, one.window)
    assert out["layer"] == shades(found, two.kept, 4, two.window)
    assert out["head"] == shades(found, two.kept[1:2], 4, two.window)
    assert out["options"][0] == "all 2 layers"
    assert [x.split()[0] for x in out["options"][1:]] == ["1", "2"]

    count = int(one.kept[:, 30].sum() + two.kept[:, 30].sum())
    ranks = np.concatenate([one.rank[:, 30], two.rank[:, 30]])
    hidden, tip, detail = out["hover"]
    assert not hidden
    assert tip.splitlines()[1] == f"kept by {count} of 4 heads ({round(100 * count / 4)}%)"
    assert tip.splitlines()[2].startswith(
        f"ranks of 16: best {ranks.min()}, mean {int(ranks.mean() + 0.5)}; mean score "
    )
    assert f"“{found.tokens.pieces[30]}”, token 30" in tip
    assert f"{one.rank[:, 30].min()} of 16" in detail
    assert out["left"]
    _, tip, detail = out["hoverLayer"]
    for h in range(2):
        assert f"{two.rank[h, 30]} of 16" in detail
    _, tip, detail = out["hoverHead"]
    assert tip.splitlines()[1] == ("kept" if two.kept[1, 30] else "dropped")
    said = re.fullmatch(r"rank (\d+) of 16, score (\S+)", tip.splitlines()[2])
    assert int(said[1]) == two.rank[1, 30]
    assert float(said[2]) == pytest.approx(two.score[1, 30], rel=0.01)

    assert out["current"] == [30]
    assert out["spoken"].startswith(f"“{found.tokens.pieces[29]}”, token 29; ")
    assert out["end"] == 180
    assert 0 < out["up"] < 180
    assert 0 < out["down"] < 180
    assert out["bracket"] == 1
    assert out["click"] == 12
    assert len(set(out["themes"])) == 2
    assert abs(out["map"] - 90) <= 1
    assert out["colours"] >= 3


@browser.needed
def test_odd_texts_in_a_browser(tmp_path):
    """As it is written, with its policy on: markup stays text, and nothing turns the text around."""
    document, _ = opened(html(odd()), tmp_path)
    text = re.search(r'<div id="text".*?(?=<aside>)', document, re.DOTALL)[0]
    assert set(re.findall(r"<(\w+)", text)) == {"div", "span"}
    seen = markup.unescape(re.sub(r"<[^>]*>", "", text))
    shown = (
        ODD.replace("\u202e", "⟨RLO⟩").replace("\u202c", "⟨PDF⟩").replace("\x00", "␀").replace("\x07", "␇")
    )
    assert shown * 4 + "".join(MARKUP) in seen
    assert text.count("hidden-text") > 20  # parts of characters, and what has no shape


@browser.needed
def test_a_saved_cache_in_a_browser(saved, tmp_path):
    path, _ = saved
    found = explain_saved(path, tiny_models.model().config)
    script = """
    const spans = [...document.querySelectorAll("#text span")];
    spans[40].dispatchEvent(new PointerEvent("pointermove", { bubbles: true }));
    return [spans.map((x) => x.textContent), document.getElementById("tip").textContent];
    """
    document, (shown, tip) = opened(html(found), tmp_path, script)
    assert shown == [str(i) for i in range(184)]
    assert tip.endswith("score and rank are not in a saved cache")
    assert "not their scores and ranks" in document


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as a directory, and a text."""
    path = tmp_path_factory.mktemp("model")
    tiny_models.model().save_pretrained(path / "model")
    tiny_models.tokenizer().save_pretrained(path / "model")
    (path / "text.txt").write_text(TEXT)
    return path


def invoke(*arguments: object, stdin: bytes | None = None):
    return CliRunner().invoke(cli.app, ["explain", *map(str, arguments)], input=stdin)


class TestCommand:
    def test_from_a_text(self, folder, tmp_path):
        settings = tmp_path / "lagkv.json"
        settings.write_text(json.dumps({"lag_size": 16, "keep_ratio": 0.5, "about": "x"}))
        run = invoke(
            "--text", folder / "text.txt", "--model", folder / "model", "--settings", settings, "--set", "sink_size=4",
            "--set", "keep=3", "--set", "score=cosine", "--chunk", 50, "--out", tmp_path / "a.html",
            "--json", tmp_path / "a.json",
        )  # fmt: skip
        assert run.exit_code == 0, run.output
        assert f"page: {tmp_path / 'a.html'}" in run.output
        assert "Not shown: 1 layer of other kinds" in run.output
        found = Explanation.from_json(json.loads((tmp_path / "a.json").read_text()))
        wanted = {"lag_size": 16, "keep": 3, "sink_size": 4, "score": "cosine"}
        assert found.arguments == wanted
        expected = explain(tiny_models.loaded(), TEXT, wanted, chunk=50)
        for a, b in zip(found.layers, expected.layers, strict=True):
            np.testing.assert_array_equal(a.kept, b.kept)
        assert "read 50 tokens at a time" in (tmp_path / "a.html").read_text()
        assert sorted(x.name for x in tmp_path.iterdir()) == ["a.html", "a.json", "lagkv.json"]

    def test_from_the_standard_input(self, folder, tmp_path):
        out = tmp_path / "a.html"
        run = invoke("--text", "-", "--model", folder / "model", "--out", out, stdin="\ufeffab\r\nc".encode())
        assert run.exit_code == 0, run.output
        data = json.loads(re.search(r'id="data">(.*?)</script>', out.read_text(), re.DOTALL)[1])
        assert data["tokens"]["pieces"] == ["<bos>", "a", "b", "\n", "c"]

    def test_from_a_saved_cache(self, folder, saved, tmp_path):
        out = tmp_path / "a.html"
        run = invoke(
            "--cache", saved[0], "--model", folder / "model", "--text", folder / "text.txt", "--out", out,
            "--sequence", 1,
        )  # fmt: skip
        assert run.exit_code == 0, run.output
        assert "not their scores and ranks" in run.output
        assert "From a saved cache." in out.read_text()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "give --text with the text to read, or --cache"),
            (["--cache", "x", "--set", "a=1"], "leave out --settings, --set and --chunk"),
            (["--text", "NONE"], "NONE cannot be read: No such file"),
            (["--text", "BAD"], "BAD is not UTF-8"),
            (["--text", "EMPTY"], "EMPTY is empty: there is nothing to explain"),
            (["--text", "TEXT", "--set", "keep"], "--set must be NAME=VALUE"),
            (["--text", "TEXT", "--set", "kep=1"], "--set has the unknown name 'kep'"),
            (["--text", "TEXT", "--set", "keep=x"], "this cache cannot be made for"),
            (["--text", "TEXT", "--settings", "NONE"], "the settings file NONE cannot be read"),
            (["--text", "TEXT", "--dtype", "int8"], "dtype must be one of"),
            (["--cache", "BAD"], "BAD is damaged, or no safetensors file"),
            (["--text", "TEXT", "--out", "NO/a.html"], "a.html cannot be written: No such file"),
        ],
    )
    def test_what_is_wrong_is_named(self, folder, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "TEXT").write_text("some text")
        (tmp_path / "EMPTY").write_text("")
        (tmp_path / "BAD").write_bytes(b"\xff\xfe\xfa")
        if "BAD" in arguments and "--text" in arguments:
            (tmp_path / "BAD").write_bytes(b"abc\xff")
        run = invoke(*arguments, "--model", folder / "model")
        assert run.exit_code == 2
        assert message in " ".join(run.output.replace("│", " ").split())

    def test_a_model_without_full_attention(self, folder, tmp_path):
        tiny_model.model(["sliding_attention"]).save_pretrained(tmp_path / "model")
        tiny_model.tokenizer().save_pretrained(tmp_path / "model")
        run = invoke("--text", folder / "text.txt", "--model", tmp_path / "model")
        assert run.exit_code == 2
        assert "has no full-attention layer" in run.output

    def test_configuration_without_weights(self, folder):
        config, tokenizer = models.load_without_weights(str(folder / "model"))
        assert config.num_hidden_layers == 3
        assert tokenizer("a")["input_ids"] == tiny_models.tokenizer()("a")["input_ids"]


def test_names_of_the_package():
    assert {
        x.__name__ for x in (ExplainError, Explanation, Layer, Tokens, explain, explain_saved, html)
    } == set(lagkv_ext.commands.explain.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lagkv_ext.commands.explain.nothing  # noqa: B018
