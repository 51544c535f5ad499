"""Marks, intervals, methods and cost formulas of the evaluation."""

from __future__ import annotations

import itertools
import math

import pytest

pytest.importorskip("transformers", reason="the evaluation needs transformers")

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lagkv_ext import LagKVCache, keep_count, output_length, read_settings, reference
from lagkv_ext.cache.fidelity import forward
from lagkv_ext.cache.keyword import cache_argument
from lagkv_ext.commands.evaluate import cost, methods, metrics, recommend
from lagkv_ext.commands.evaluate.prefill import OBSERVED, read
from lagkv_ext.commands.evaluate.statistics import Difference, Interval, difference, mean_interval
from lagkv_ext.commands.evaluate.tasks import fidelity
from lagkv_ext.commands.evaluate.types import FULL, EvaluationError, Setting
from tests.evaluate import tiny_models as evaluate_models


@given(size=st.integers(1, 5000), prompts=st.integers(1, 9), words=st.integers(1, 50))
def test_no_window_of_a_text_is_continued_twice(size, prompts, words):
    """Counted twice, a prompt would narrow the interval that it is in."""

    def pieces(text: str, tokens: int) -> list[str]:
        cut = text.split()[:: 51 - words]
        return [f"{word} " for word in cut]

    samples = fidelity.fidelity(0, pieces, size=size, prompts=prompts, tokens=8)
    assert len({sample.context for sample in samples}) == len(samples) <= prompts
    assert {sample.facts["text"] for sample in samples} == {"prose", "code"} - (
        {"code"} if prompts == 1 else set()
    )


TEXT = st.text(alphabet="ab c,.東京は", max_size=12)


class TestMetrics:
    @pytest.mark.parametrize(
        ("said", "wanted", "value"),
        [
            ("The cat sat.", "a cat sat", 1.0),  # articles and punctuation do not count
            ("the cat sat on the mat", "cat", 2 * 1 / (4 + 1)),
            ("dog", "cat", 0.0),
            ("", "", 1.0),
            ("", "cat", 0.0),
            ("東京都", "東京", 2 * 2 / (3 + 2)),  # by characters
            ("北京。", "北京", 1.0),
        ],
    )
    def test_f1_of_known_pairs(self, said, wanted, value):
        assert metrics.f1(said, wanted) == pytest.approx(value)

    @pytest.mark.parametrize(
        ("said", "wanted", "value"),
        [
            # Lin 2004, section 3.1: LCS 3 of 4 and LCS 2 of 4 words against "police killed the gunman".
            ("police kill the gunman", "police killed the gunman", 0.75),
            ("the gunman kill police", "police killed the gunman", 0.5),
            ("東京は雨", "東京は晴れ", 2 * 3 / (4 + 5)),
        ],
    )
    def test_rouge_l_of_known_pairs(self, said, wanted, value):
        assert metrics.rouge_l(said, wanted) == pytest.approx(value)

    @given(TEXT, TEXT)
    def test_marks_are_shares_and_perfect_for_the_answer_itself(self, said, wanted):
        for name, metric in metrics.METRICS.items():
            assert 0.0 <= metric(said, wanted) <= 1.0, name
            if name not in ("number_share", "code_similarity"):
                assert metric(wanted, wanted) == 1.0, name
        assert metrics.f1(said, wanted) == pytest.approx(metrics.f1(wanted, said))
        assert metrics.rouge_l(said, wanted) == pytest.approx(metrics.rouge_l(wanted, said))
        if metrics.exact(said, wanted):
            assert metrics.contains(said, wanted) == 1.0

    def test_contains_compares_whole_words(self):
        assert metrics.contains("it is 12345.", "12345") == 1.0
        assert metrics.contains("it is 123456.", "12345") == 0.0
        # An answer that is an article.
        assert metrics.exact("", "a") == metrics.contains("", "a") == 0.0

    def test_longbench_counts(self):
        assert metrics.number_share("Paragraph 3 or 4", "Paragraph 3") == 0.5
        assert metrics.classification("it is a Date, or Food", "Date", ["Date", "Food", "City"]) == 0.5
        assert metrics.classification("Other date", "Date", ["Other date", "Date"]) == 0.0
        assert metrics.code_similarity("# note\nreturn x\nmore", "return x") == 1.0
        assert metrics.best("classification", "Date", ["City", "Date"], ["City", "Date"]) == 1.0


class TestStatistics:
    @given(
        st.dictionaries(
            st.integers(), st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=6
        )
    )
    def test_interval_holds_the_mean_and_stays_in_range(self, scores):
        x = mean_interval(scores, draws=200)
        flat = [v for group in scores.values() for v in group]
        assert x.mean == pytest.approx(np.mean(flat))
        assert x.questions == len(flat)
        if x.low is None:
            assert len(flat) == 1
        else:
            assert min(flat) - 1e-9 <= x.low <= x.high <= max(flat) + 1e-9

    @given(
        st.dictionaries(
            st.integers(), st.lists(st.floats(0, 1), min_size=1, max_size=3), min_size=5, max_size=8
        )
    )
    def test_a_constant_shift_is_seen_and_no_shift_is_noise(self, scores):
        lower = {k: [x - 0.25 for x in v] for k, v in scores.items()}
        assert difference(lower, scores, draws=200).verdict == "worse"
        assert difference(scores, lower, draws=200).verdict == "better"
        assert difference(scores, scores, draws=200).verdict == "noise"

    def test_coverage_is_near_the_level(self):
        rng = np.random.default_rng(1)
        hits = 0
        for i in range(200):
            x = mean_interval(
                {j: [v] for j, v in enumerate(rng.normal(0.5, 0.1, size=20))}, seed=i, draws=400
            )
            hits += x.low <= 0.5 <= x.high
        assert 0.85 <= hits / 200 <= 0.99

    def test_few_prompts_give_no_verdict(self):
        assert difference({i: [0.0] for i in range(4)}, {i: [1.0] for i in range(4)}).verdict == "unknown"
        assert difference({i: [0.0] for i in range(5)}, {i: [1.0] for i in range(5)}).verdict == "worse"

    def test_prompts_are_drawn_whole(self):
        # Two prompts of 50 equal answers hold as much as two answers: the interval must span both.
        x = mean_interval({"a": [0.0] * 50, "b": [1.0] * 50})
        assert (x.low, x.high, x.unit) == (0.0, 1.0, "prompt")

    def test_refuses_what_cannot_be_compared(self):
        with pytest.raises(ValueError, match="2 scores against 1"):
            difference({"a": [0.0, 1.0]}, {"a": [0.0]})
        with pytest.raises(ValueError, match="no scores"):
            difference({"a": [0.0]}, {"b": [0.0]})


@pytest.fixture(scope="module")
def prefill():
    ids = torch.randint(2, 90, (1, 150), generator=torch.Generator().manual_seed(3))
    model = evaluate_models.model()
    return read(model, ids, [1, 2], attention=True)


def layer(prefill, which=1, **sizes):
    key, value = prefill.rows(which)
    sizes = {"sink_size": 4, "lag_size": 16, "keep": 4, **sizes}
    return methods.Layer(key, value, layer=which, attention=prefill.attention[which], **sizes)


OURS = (
    "lagkv-std",
    "lagkv-std-k",
    "lagkv-cosine",
    "lagkv-cosine-v",
    "lagkv-cosine-head",
    "lagkv-blend-smooth3",
    "lagkv-blend-smooth3-head",
    "lagkv-blend-w2-v0.5-smooth5-head",
)


class TestMethods:
    @pytest.mark.parametrize("name", [*methods.METHODS, *OURS])
    @pytest.mark.parametrize("keep", [1, 5, 15])
    def test_every_method_keeps_what_lagkv_keeps(self, prefill, name, keep):
        x = layer(prefill, keep=keep)
        index = methods.select(methods.resolve(name), x)
        assert index.shape == (1, 2, output_length(150, 4, 16, keep))
        position = torch.arange(150, dtype=torch.int32)
        assert torch.equal(index[0, 0, :4], position[:4])
        tail = 16 + (150 - 4) % 16
        assert torch.equal(index[0, 1, -tail:], position[-tail:])

    def test_scores_choose_the_highest(self, prefill):
        x = layer(prefill)
        free = x.candidates
        norm = x.key.float().norm(dim=-1)[..., free]
        index = methods.select(methods.resolve("keynorm"), x).long()
        inside = (index >= free.start) & (index < free.stop)
        for h in range(2):
            kept = index[0, h][inside[0, h]] - free.start
            left = torch.ones(norm.shape[-1], dtype=torch.bool)
            left[kept] = False
            assert norm[0, h][kept].max() <= norm[0, h][left].min()

    def test_lagkv_is_the_reference(self, prefill):
        x = layer(prefill)
        for score in ("std", "cosine"):
            expected = reference.compress(x.key, x.value, 4, 16, 4, score=score)[2]
            assert torch.equal(methods.resolve(f"lagkv-{score}")(x), expected)
            keys = reference.compress(x.key, x.value, 4, 16, 4, score=score, value_weight=0.0)[2]
            assert torch.equal(methods.resolve(f"lagkv-{score}-k")(x), keys)
            values = reference.compress(x.value, x.value, 4, 16, 4, score=score, value_weight=0.0)[2]
            assert torch.equal(methods.resolve(f"lagkv-{score}-v")(x), values)

    @pytest.mark.parametrize("smooth", [1, 3])
    def test_options_are_the_references(self, prefill, smooth):
        x = layer(prefill)
        name = f"-smooth{smooth}" if smooth > 1 else ""
        for score, budget in itertools.product(("std", "cosine", "blend"), ("partition", "head")):
            options = {"score": score, "value_weight": 0.5, "smooth": smooth, "budget": budget}
            expected = reference.compress(x.key, x.value, 4, 16, 4, **options)[2]
            found = methods.resolve(f"lagkv-{score}-v0.5{name}" + "-head" * (budget == "head"))
            assert torch.equal(found(layer(prefill)), expected)

    def test_the_blends_weight_goes_from_the_cosine_to_the_papers_score(self, prefill):
        x = layer(prefill)
        std = reference.lag_score(x.key, x.value, 4, 16, score="std")
        one, three = (methods.resolve(f"lagkv-blend-w{w}").scores(x) for w in (1, 3))
        assert torch.allclose(three - one, 2 * 16 * std, atol=1e-4)

    def test_names_of_options(self):
        parse = methods.LagKV.parse
        assert parse("lagkv-blend-smooth3-head") == methods.LagKV("blend", smooth=3, budget="head")
        assert parse("lagkv-std-v") == methods.LagKV("std", use="value")
        assert parse("lagkv-std-v0.5") == methods.LagKV("std", value_weight=0.5)
        assert parse("lagkv-std").arguments == {"score": "std"}
        assert parse("lagkv-cosine-k").arguments == {"score": "cosine", "value_weight": 0.0}
        assert parse("lagkv-blend-smooth3-head").arguments == {
            "score": "blend",
            "smooth": 3,
            "budget": "head",
        }
        assert parse("lagkv-std-v").arguments is parse("lagkv-blend-w2").arguments is None
        for wrong in (
            "lagkv",
            "lagkv-",
            "lagkv-none",
            "lagkv-std-smooth2",  # even
            "lagkv-std-smooth3-smooth5",
            "lagkv-std-w2",  # no blend
            "lagkv-std-k-v",
            "lagkv-std-k-v0.5",
            "lagkv-std-v1.2.3",
            "lagkv-blend-w",
            "lagkv-std-smooth1.5",
            "lagkv-std-head-more",
        ):
            assert parse(wrong) is None, wrong
            with pytest.raises(EvaluationError, match="there is no method"):
                methods.resolve(wrong)

    def test_attention_is_that_of_the_model(self, prefill):
        """Against the weights that the eager attention of transformers returns."""
        model = evaluate_models.model("eager")
        weights = model(prefill.ids, output_attentions=True).attentions
        for i in (1, 2):
            grouped = weights[i].unflatten(1, (2, 2)).mean(dim=2)
            torch.testing.assert_close(
                prefill.attention[i].accumulated, grouped.sum(dim=2), atol=1e-4, rtol=1e-4
            )
            torch.testing.assert_close(
                prefill.attention[i].observed, grouped[:, :, -OBSERVED:].sum(dim=2), atol=1e-4, rtol=1e-4
            )

    def test_watching_leaves_the_model_as_it_was(self, prefill):
        assert evaluate_models.model().config._attn_implementation == "sdpa"

    def test_eager_attention_is_refused_by_name(self):
        with pytest.raises(EvaluationError, match=r"h2o and snapkv.*'eager'"):
            read(evaluate_models.model("eager"), torch.ones(1, 8, dtype=torch.long), [1, 2], attention=True)

    def test_random_differs_between_prompts_and_repeats_for_one(self, prefill):
        key, value = prefill.rows(1)

        def chosen(prompt, seed=0):
            setting = Setting("random", 0.25, 16, 4)
            x = methods.layer_of(setting, key, value, layer=1, prompt=prompt, seed=seed, attention=None)
            return methods.select(methods.resolve("random"), x)

        assert torch.equal(chosen("a"), chosen("a"))
        assert not torch.equal(chosen("a"), chosen("b"))
        assert not torch.equal(chosen("a"), chosen("a", seed=1))

    def test_other_lag_sizes_at_the_same_budget(self, prefill):
        key, value = prefill.rows(1)
        budget = output_length(150, 4, 16, keep_count(0.25, 16))
        for lag in (4, 8, 16, 24):
            setting = Setting("lagkv-std", 0.25, lag, 4, options=(("as_L", 16),))
            x = methods.layer_of(setting, key, value, layer=1, prompt="", seed=0, attention=None)
            assert x.rows <= budget < output_length(150, 4, lag, x.keep + 1)
        setting = Setting("lagkv-std", 0.25, 64, 4, options=(("as_L", 16),))
        with pytest.raises(methods.NotPossible, match="lag_size 64"):
            methods.layer_of(setting, key, value, layer=1, prompt="", seed=0, attention=None)

    def test_too_short_is_said(self, prefill):
        with pytest.raises(methods.NotPossible, match=r"150 tokens are fewer than .* = 204"):
            methods.select(methods.resolve("window"), layer(prefill, lag_size=100))

    def test_own_functions(self, prefill):
        x = layer(prefill)
        own = methods.resolve("lagkv_ext.commands.evaluate.methods:key_norm")
        assert torch.equal(methods.select(own, x), methods.select(methods.resolve("keynorm"), x))

    def test_own_entry_points(self, prefill, monkeypatch):
        from importlib.metadata import EntryPoint

        point = EntryPoint("mine", "lagkv_ext.commands.evaluate.methods:key_norm", methods.ENTRY_POINTS)
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [point])
        x = layer(prefill)
        assert torch.equal(
            methods.select(methods.resolve("mine"), x), methods.select(methods.resolve("keynorm"), x)
        )
        with pytest.raises(EvaluationError, match="snapkv, mine, or module:function"):
            methods.resolve("none")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("lagkv", "there is no method 'lagkv'; there are full, lagkv-std"),
            ("no_such_module:f", "'no_such_module:f' cannot be imported: No module named"),
            ("math:no_such", "cannot be imported: module 'math' has no attribute"),
            ("math:pi", "must be a function, got float"),
        ],
    )
    def test_unknown_methods_are_refused(self, name, message):
        with pytest.raises(EvaluationError, match=message):
            methods.resolve(name)

    def test_own_function_of_the_wrong_shape_is_refused(self, prefill, monkeypatch):
        monkeypatch.setattr(math, "own", lambda layer: layer.key[..., 0, 0], raising=False)
        with pytest.raises(
            EvaluationError, match=r"math:own must return .* \[1, 2, 150\], got torch.float32 \[1, 2\]"
        ):
            methods.resolve("math:own")(layer(prefill))


class TestFork:
    def test_all_rows_answer_as_the_full_cache(self, prefill):
        model = evaluate_models.model()
        ids = torch.randint(2, 90, (1, 20), generator=torch.Generator().manual_seed(4))
        whole = model(torch.cat([prefill.ids, ids], dim=1)).logits[:, 150:]
        rows = torch.arange(150, dtype=torch.int32).expand(1, 2, -1).contiguous()
        for indices in ((), ({1: rows, 2: rows},)):
            said = forward(model, ids, prefill.fork(*indices), position=150, logits_to_keep=0)
            torch.testing.assert_close(said, whole, atol=2e-4, rtol=1e-3)

    def test_compressed_fork_answers_as_lagkv_cache(self, prefill):
        """Token by token and several at once, positions and masks included."""
        model = evaluate_models.model()
        ids = torch.randint(2, 90, (1, 12), generator=torch.Generator().manual_seed(5))
        index = {i: methods.select(methods.resolve("lagkv-std"), layer(prefill, i)) for i in (1, 2)}
        # 12 tokens do not fill the next partition, so the cache does not compress again meanwhile.
        cache = LagKVCache(model.config, keep=4, lag_size=16, sink_size=4)
        with torch.inference_mode():
            model(prefill.ids, **cache_argument(cache))
            expected = model(ids, **cache_argument(cache)).logits
            together = forward(model, ids, prefill.fork(index), position=150, logits_to_keep=0)
            fork = prefill.fork(index)
            single = [
                forward(model, ids[:, i : i + 1], fork, position=150 + i, logits_to_keep=1) for i in range(12)
            ]
        torch.testing.assert_close(together, expected, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(torch.cat(single, dim=1), expected, atol=2e-4, rtol=1e-3)

    def test_a_batch_of_forks_answers_as_each_alone(self, prefill):
        ids = torch.randint(2, 90, (1, 9), generator=torch.Generator().manual_seed(6))
        indices = [
            {i: methods.select(methods.resolve(name), layer(prefill, i)) for i in (1, 2)}
            for name in ("lagkv-std", "window", "h2o")
        ]
        model = evaluate_models.model()
        with torch.inference_mode():
            batch = forward(model, ids.expand(3, -1), prefill.fork(*indices), position=150, logits_to_keep=0)
            for said, index in zip(batch, indices, strict=True):
                alone = forward(model, ids, prefill.fork(index), position=150, logits_to_keep=0)
                torch.testing.assert_close(said, alone[0], atol=2e-4, rtol=1e-3)

    def test_forks_do_not_touch_the_original(self, prefill):
        before = [x.keys.clone() for x in prefill.cache.layers]
        fork = prefill.fork()
        forward(evaluate_models.model(), torch.full((1, 40), 5), fork, position=150, logits_to_keep=1)
        assert all(torch.equal(a, x.keys) for a, x in zip(before, prefill.cache.layers, strict=True))
        assert prefill.cache.layers[0].get_seq_length() == 150


class TestCost:
    SHAPE = cost.Shape(
        layers=4, full_layers=2, kv_heads=2, head_dim=8, element_size=4, weight_bytes=10**6, window=15
    )

    def test_numbers_by_hand(self):
        machine = cost.Machine(memory=2e9, bandwidth=1e9, price=3.6)
        full = cost.cost(self.SHAPE, FULL, context=1000, machine=machine, batch=2)
        assert self.SHAPE.row_bytes == 128
        assert full.full_layer_bytes == 2 * 1000 * 128
        assert full.cache_bytes == 2 * 1000 * 128 + 2 * 15 * 128
        assert full.sequences == (1_800_000_000 - 1_000_000) // full.cache_bytes
        assert full.tokens_per_s == pytest.approx(2e9 / (1e6 + 2 * full.cache_bytes))
        assert full.per_million == pytest.approx(1e6 * 3.6 / 3600 / full.tokens_per_s)
        small = cost.cost(self.SHAPE, Setting("lagkv-std", 0.25, 100, 16), context=1000, machine=machine)
        assert small.rows == 16 + 25 * 8 + 100 + 84

    def test_shape_of_a_configuration(self):
        from transformers import LlamaConfig

        config = LlamaConfig(
            hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
        )
        shape = cost.Shape.from_config(config, element_size=2, weight_bytes=16_060_522_496)
        assert (shape.layers, shape.full_layers, shape.window) == (32, 32, None)
        # The well-known 128 KiB per token of Llama 3.1 8B in 16 bits.
        assert cost.cost(shape, FULL, context=1000).cache_bytes == 1000 * 131072
        mine = cost.Shape.from_config(evaluate_models.model().config, element_size=4, weight_bytes=1)
        assert (mine.layers, mine.full_layers, mine.row_bytes, mine.window) == (3, 2, 128, 15)

    def test_no_room_for_the_weights(self):
        c = cost.cost(self.SHAPE, FULL, context=10, machine=cost.Machine(memory=1e6, price=1.0))
        assert (c.sequences, c.tokens_per_s, c.per_million) == (0, 0.0, None)

    def test_check_finds_a_wrong_byte(self):
        record = {"setting": FULL.to_json(), "tokens": 100, "full_layer_bytes": 2 * 100 * 128}
        assert cost.check(self.SHAPE, [record]).largest_error == 0.0
        record["full_layer_bytes"] += 128
        assert cost.check(self.SHAPE, [record]).largest_error > 0.0


def loss(mean, low, high, units=8):
    return Difference(Interval(mean, low, high, units, units, "prompt"))


class TestRecommend:
    @pytest.mark.parametrize(
        ("given_loss", "verdict"),
        [
            (loss(-0.01, -0.015, -0.005), "ok"),  # significant, but within the tolerance
            (loss(-0.05, -0.09, -0.01), "worse"),
            (loss(-0.05, -0.09, 0.01), "ok"),  # noise, and narrow
            (loss(-0.20, -0.45, 0.05), "undecided"),  # noise so wide that it says nothing
            (loss(-0.20, -0.45, -0.05, units=3), "undecided"),
            (loss(0.10, 0.05, 0.15), "ok"),
        ],
    )
    def test_judgements(self, given_loss, verdict):
        assert recommend.judge(given_loss, 2.0) == verdict

    def test_lines_make_the_cache(self, tmp_path):
        config = evaluate_models.model().config
        for setting in (
            Setting("lagkv-cosine", 0.25, 64, 8),
            Setting("lagkv-cache", 0.5, 64, 8, (("chunk", 128), ("layer1", 0.25), ("score", "std"))),
        ):
            made = eval(
                recommend.line(setting), {"LagKVCache": LagKVCache}, {"model": evaluate_models.model()}
            )
            (tmp_path / "lagkv.json").write_text(recommend.config(setting))
            again = LagKVCache(config, **read_settings(tmp_path / "lagkv.json"))
            for i in (1, 2):
                assert made.layers[i].settings == again.layers[i].settings
        assert made.layers[1].settings.keep == 16
        assert made.layers[2].settings.keep == 32
        assert recommend.arguments(Setting("window", 0.5)) is None
