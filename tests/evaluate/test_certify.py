"""The guarantee: p-values, the order of tests, and the error rate that is promised, in 10,000 simulated runs each."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction

import pytest

pytest.importorskip("transformers", reason="the evaluation needs transformers")

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lagkv_ext import read_settings
from lagkv_ext.commands.evaluate import certify, recommend
from lagkv_ext.commands.evaluate.learn_then_test import (
    binomial_cdf,
    binomial_p,
    certified,
    hoeffding_bentkus_p,
    prompts_needed,
)
from lagkv_ext.commands.evaluate.run import Plan, evaluate, report_again
from lagkv_ext.commands.evaluate.summary import summarise
from lagkv_ext.commands.evaluate.types import EvaluationError, Question, Setting
from lagkv_ext.serving.rollout.ladder import read_ladder
from tests.evaluate import tiny_models

RUNS = 10_000
LEVEL = 0.05


def exact_cdf(k: int, n: int, p: Fraction) -> Fraction:
    return sum((math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(k + 1)), Fraction(0))


class TestPValues:
    @given(st.integers(0, 60), st.integers(1, 49), st.data())
    def test_binomial_tails_are_exact(self, n, fiftieths, data):
        p = Fraction(fiftieths, 50)
        k = data.draw(st.integers(0, n))
        assert binomial_cdf(n, float(p))[k] == pytest.approx(float(exact_cdf(k, n, p)), rel=1e-12, abs=0)

    @pytest.mark.parametrize(("n", "k"), [(2000, 0), (2000, 15), (2000, 40), (5000, 60), (5000, 100)])
    def test_binomial_tails_of_many_prompts(self, n, k):
        exact = float(exact_cdf(k, n, Fraction(1, 50)))
        assert binomial_cdf(n, 0.02, k)[k] == pytest.approx(exact, rel=1e-10, abs=0)

    @given(st.integers(1, 300), st.floats(0.001, 0.9), st.data())
    def test_hoeffding_bentkus_is_its_formula(self, n, bound, data):
        total = data.draw(st.floats(0, n))
        mean = total / n
        hoeffding = 1.0
        if mean < bound:
            divergence = mean * math.log(mean / bound) if mean > 0 else 0.0
            divergence += (1 - mean) * math.log((1 - mean) / (1 - bound))
            hoeffding = math.exp(-n * divergence)
        count = math.ceil(total - n * 1e-6)
        bentkus = math.e * binomial_cdf(n, bound)[max(count, 0)]
        assert hoeffding_bentkus_p(total, n, bound) == pytest.approx(min(hoeffding, bentkus, 1.0), rel=1e-9)

    @given(st.integers(1, 400), st.floats(0.005, 0.5))
    def test_more_loss_is_less_evidence(self, n, bound):
        totals = np.arange(n + 1)
        for test in (binomial_p, hoeffding_bentkus_p):
            p = test(totals, n, bound)
            assert np.all(np.diff(p) >= -1e-12)
            assert p[0] == pytest.approx((1 - bound) ** n, rel=1e-9)
            assert p[-1] == pytest.approx(1.0)

    def test_what_is_no_loss_is_refused(self):
        for test in (binomial_p, hoeffding_bentkus_p):
            for total in (-1, 11, math.nan):
                with pytest.raises(ValueError, match="must be"):
                    test(total, 10, 0.1)
        with pytest.raises(ValueError, match="whole numbers"):
            binomial_p(1.5, 10, 0.1)
        with pytest.raises(ValueError, match="p in"):
            binomial_cdf(10, 0.0)

    def test_prompts_needed(self):
        # 0.98^149 is the first power below 0.05: without any loss no test of any kind needs fewer.
        assert prompts_needed(0.0, 0.02, 0.05, binary=True) == 149
        assert prompts_needed(0.0, 0.02, 0.05, binary=False) == 149
        assert prompts_needed(0.02, 0.02, 0.05, binary=False) is None
        assert prompts_needed(0.0199999, 0.02, 0.05, binary=True) is None  # more than anybody has
        assert prompts_needed(0.5, 1.0, 0.05, binary=False) == 1

    @given(st.floats(0, 0.015), st.sampled_from([0.02, 0.05]), st.sampled_from([0.05, 0.01]), st.booleans())
    def test_the_prompts_needed_suffice(self, mean, bound, level, binary):
        n = prompts_needed(mean, bound, level, binary=binary)
        test = binomial_p if binary else hoeffding_bentkus_p
        total = math.ceil(n * (mean - 1e-6)) if binary else n * mean
        assert test(total, n, bound) <= level
        assert n >= 149 * (0.02 / bound) * 0.98


def graphical_procedure(orders, level):
    """Bretz et al. 2009, algorithm 1, on the graph of the orders: an independent statement of `certified`."""
    nodes = [(i, j) for i, order in enumerate(orders) for j in range(len(order))]
    filled = [i for i, order in enumerate(orders) if order]
    share = {x: level / len(filled) if x[1] == 0 else 0.0 for x in nodes}
    moves = {(a, b): 0.0 for a in nodes for b in nodes}
    for i, j in nodes:
        if j + 1 < len(orders[i]):
            moves[(i, j), (i, j + 1)] = 1.0
        else:
            others = [k for k in filled if k != i]
            moves.update({((i, j), (k, 0)): 1 / len(others) for k in others})
    left, rejected = list(nodes), set()
    while found := [x for x in left if orders[x[0]][x[1]] <= share[x] and share[x] > 0]:
        x = found[0]
        left.remove(x)
        rejected.add(x)
        for a in left:
            share[a] += share[x] * moves[x, a]
        new = {}
        for a in left:
            for b in left:
                back = moves[a, x] * moves[x, a]
                new[a, b] = (
                    (moves[a, b] + moves[a, x] * moves[x, b]) / (1 - back) if a != b and back < 1 else 0.0
                )
        moves.update(new)
    return rejected


P_VALUES = st.one_of(st.floats(0, 1), st.floats(0, 0.05), st.just(0.0))


class TestOrders:
    @given(st.lists(st.lists(P_VALUES, max_size=4), max_size=4), st.sampled_from([0.01, 0.05, 0.5]))
    def test_it_is_the_graphical_procedure(self, orders, level):
        counts = certified(orders, level)
        # Sums of shares are rounded differently in the two.
        close = any(
            math.isclose(p, level * a / b, rel_tol=1e-9)
            for o in orders
            for p in o
            for b in range(1, 25)
            for a in range(1, b + 1)
        )
        if not close:
            expected = graphical_procedure(orders, level)
            assert {(i, j) for i, count in enumerate(counts) for j in range(count)} == expected

    @given(st.lists(P_VALUES, max_size=8))
    def test_one_order_ends_at_its_first_failure(self, order):
        assert certified([order], LEVEL) == [int(np.cumprod(np.asarray(order) <= LEVEL).sum())]

    def test_the_share_of_a_finished_order_passes_on(self):
        assert certified([[0.0], [0.04]], LEVEL) == [1, 1]
        assert certified([[0.03], [0.04]], LEVEL) == [0, 0]
        assert certified([[], [0.04]], LEVEL) == [0, 1]
        assert certified([], LEVEL) == []

    def test_nan_is_refused(self):
        with pytest.raises(ValueError, match="p-values"):
            certified([[0.0, math.nan]], LEVEL)


def losses(rng, true, n, kind, dependence):
    """Totals ``[RUNS, settings]`` of ``n`` losses with these expectations."""
    settings = len(true)
    if dependence == "independent":
        uniform = rng.random((RUNS, n, settings), dtype=np.float32)
    else:  # the same prompts are hard for all settings, or for every second one
        uniform = np.repeat(rng.random((RUNS, n, 1), dtype=np.float32), settings, axis=2)
        if dependence == "opposed":
            uniform[:, :, 1::2] = 1 - uniform[:, :, 1::2]
    true = np.asarray(true, dtype=np.float32)
    if kind == "binary":
        return (uniform < true).sum(axis=1)
    # Half of what is lost in whole, half in parts of a third; expectation `true`.
    return (uniform < true / 2).sum(axis=1) + ((uniform >= true / 2) & (uniform < 2 * true)).sum(axis=1) / 3


def error_rate(wrong) -> float:
    return float(np.mean(wrong))


#: The rate that a correct test with error probability LEVEL exceeds once in about a thousand simulations.
ALLOWED = LEVEL + 3.1 * math.sqrt(LEVEL * (1 - LEVEL) / RUNS)
BOUND = 0.1
N = 61  # prompts: here the binomial test uses 0.049 of its level of 0.05
JUST_ABOVE = 0.1001
TRUE = {
    "all at the bound": [JUST_ABOVE] * 8,
    "growing": [0.0, 0.02, 0.05, 0.08, JUST_ABOVE, 0.11, 0.15, 0.3],
    "the largest is worst": [JUST_ABOVE, 0.0, 0.0, JUST_ABOVE, 0.0, 0.12, 0.0, 0.0],
    "good until one": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, JUST_ABOVE],
}


@pytest.mark.parametrize("true", TRUE.values(), ids=TRUE.keys())
@pytest.mark.parametrize("kind", ["binary", "thirds"])
@pytest.mark.parametrize("dependence", ["independent", "together", "opposed"])
def test_the_error_rate_is_at_most_as_promised(true, kind, dependence):
    rng = np.random.default_rng(7)
    n = N
    test = binomial_p if kind == "binary" else hoeffding_bentkus_p
    passed = test(losses(rng, true, n, kind, dependence), n, BOUND) <= LEVEL
    wrong = np.cumprod(passed, axis=1).astype(bool) & (np.asarray(true) > BOUND)
    assert error_rate(wrong.any(axis=1)) <= ALLOWED


def test_the_simulation_would_find_naive_picking():
    """Taking the smallest setting that passes, whatever the larger ones do, is wrong far more often."""
    rng = np.random.default_rng(7)
    n = N
    passed = binomial_p(losses(rng, [JUST_ABOVE] * 8, n, "binary", "independent"), n, BOUND) <= LEVEL
    assert error_rate(passed.any(axis=1)) > 0.2
    assert (
        0.01 < error_rate(passed[:, 0]) <= ALLOWED
    )  # the first alone is what the level allows, and not nothing


def test_several_orders_share_the_level():
    rng = np.random.default_rng(8)
    n, orders = N, 6
    # One order is good to its end, and passes its share on; the others fail at their first.
    true = np.asarray([[0.0, 0.0], *[[JUST_ABOVE, 0.0]] * (orders - 1)])
    p = binomial_p(losses(rng, true.ravel(), n, "binary", "independent"), n, BOUND).reshape(RUNS, orders, 2)
    counts = np.asarray([certified(x, LEVEL) for x in p.tolist()])
    wrong = (counts[:, 1:] > 0).any(axis=1)
    assert error_rate(wrong) <= ALLOWED
    assert error_rate(counts[:, 0] == 2) > 0.9
    assert error_rate((p[:, 1:, 0] <= LEVEL).any(axis=1)) > 0.1  # what no sharing would do


@pytest.mark.parametrize("shares", [(0.0, 2.0), (0.5, 1.5), (0.9, 1.1)])
@pytest.mark.parametrize("kind", ["binary", "thirds"])
def test_tasks_with_different_losses(shares, kind):
    """Half of the prompts from each of two tasks, whose expected losses average just above the bound."""
    rng = np.random.default_rng(9)
    total = sum(losses(rng, [JUST_ABOVE * s], 40, kind, "independent") for s in shares)
    test = binomial_p if kind == "binary" else hoeffding_bentkus_p
    assert error_rate(test(total, 80, BOUND) <= LEVEL) <= ALLOWED


def test_questions_of_one_prompt_are_no_units():
    """Five questions on a prompt that are lost together: as prompts the rate holds, as questions it does not."""
    rng = np.random.default_rng(10)
    lost = losses(rng, [JUST_ABOVE], N, "binary", "independent")
    assert error_rate(binomial_p(lost, N, BOUND) <= LEVEL) <= ALLOWED
    assert error_rate(binomial_p(5 * lost, 5 * N, BOUND) <= LEVEL) > 2 * LEVEL


def test_trying_again_with_more_prompts():
    """Attempts on new prompts with a share of the level each, until one certifies: the rate of all together holds.
    Testing everything so far again and again at the full level does not.
    """
    rng = np.random.default_rng(11)
    batch, attempts = N, 8
    lost = np.stack(
        [losses(rng, [JUST_ABOVE], batch, "binary", "independent")[:, 0] for _ in range(attempts)]
    )
    spent = certify.Attempt(1 - LEVEL, 100 * BOUND, 1.0, True, {"t": batch})
    levels = [certify._level([spent] * k, 1 - LEVEL) for k in range(attempts)]
    assert sum(levels) <= LEVEL
    assert levels[0] == pytest.approx(0.8 * LEVEL)
    ours = np.stack([binomial_p(x, batch, BOUND) <= level for x, level in zip(lost, levels, strict=True)])
    assert error_rate(ours.any(axis=0)) <= ALLOWED
    sums = np.cumsum(lost, axis=0)
    naive = np.stack([binomial_p(x, batch * (k + 1), BOUND) <= LEVEL for k, x in enumerate(sums)])
    assert error_rate(naive.any(axis=0)) > 2 * LEVEL


FULL = Setting("full")
HALF, QUARTER = Setting("lagkv-std", 0.5), Setting("lagkv-std", 0.25)
COSINE = Setting("lagkv-cosine", 0.5)


def records(scores, setting=FULL, *, task="t", first=0, share=1.0, binary=True, **more):
    """One prompt a score (or a list of scores of its questions)."""
    return [
        {
            "kind": "result",
            "task": task,
            "sample": str(i),
            "digest": f"d{i}",
            "context": f"c{i}",
            "setting_name": setting.name,
            "setting": setting.to_json(),
            "tokens": 1000,
            "rows": 1000 * share,
            "full_layer_bytes": 1000 * share,
            "cache_bytes": 1000 * share,
            "questions": [{"score": s, "binary": binary} for s in (x if isinstance(x, list) else [x])],
            **more,
        }
        for i, x in enumerate(scores, first)
    ]


def attempt(lines, tolerance=2.0, **options):
    return certify.attempt(lines, testable=recommend.deployable, tolerance=tolerance, **options)


def known(lines, tolerance=2.0, **options):
    return certify.certificates(lines, testable=recommend.deployable, tolerance=tolerance, **options)


def many(count=200, half=(), quarter=(), first=0, **more):
    """Prompts that the full cache answers; HALF and QUARTER fail on those named."""
    lines = records([1.0] * count, first=first, **more)
    for setting, lost, share in ((HALF, half, 0.6), (QUARTER, quarter, 0.4)):
        lines += records(
            [float(i not in lost) for i in range(first, first + count)],
            setting,
            first=first,
            share=share,
            **more,
        )
    return lines


class TestLadder:
    def rungs(self, lines, certain=()):
        state = known(lines)
        state.certified.update({name: certify.Attempt(0.95, 2.0, 0.04, True, {"t": 200}) for name in certain})
        found = recommend.recommend(summarise(lines), certificates=state)
        return [x.setting for x in recommend.ladder(found)]

    def test_from_the_largest_to_the_best(self):
        eighth = records([1.0] * 200, Setting("lagkv-std", 0.125), share=0.3)
        assert self.rungs(many() + eighth) == [HALF, QUARTER, Setting("lagkv-std", 0.125)]
        # One in between that fails is left out; another method is another ladder.
        lines = many(quarter=range(50)) + eighth + records([1.0] * 200, COSINE, share=0.5)
        assert self.rungs(lines) == [HALF, Setting("lagkv-std", 0.125)]

    def test_with_a_certificate_only_what_has_one(self):
        assert self.rungs(many(), certain=(HALF.name,)) == [HALF]
        assert self.rungs(many(), certain=(QUARTER.name,)) == [QUARTER]

    def test_none_where_nothing_passes(self):
        assert self.rungs(many(half=range(100), quarter=range(100))) == []

    def test_each_rung_holds_less(self):
        same = records([1.0] * 200, Setting("lagkv-std", 0.26), share=0.4)
        assert [x.keep_ratio for x in self.rungs(many() + same)] == [0.5, 0.25]


class TestAttempts:
    def test_from_the_largest_cache_to_the_smallest(self):
        found = attempt(many(quarter=range(20)))
        assert [(x.setting, x.certified) for x in found.tested] == [(HALF, True), (QUARTER, False)]
        assert (found.level, found.prompts, found.binary) == (pytest.approx(0.04), 200, True)
        assert found.tested[0].p_value == pytest.approx(0.98**200)
        assert found.tested[1].mean_loss == pytest.approx(0.1)
        # The larger one fails: the smaller one is not certified, however good.
        assert not any(x.certified for x in attempt(many(half=range(20))).tested)

    def test_it_survives_the_file(self):
        found = attempt(many(quarter=range(20)))
        assert certify.Attempt.from_json(json.loads(json.dumps(found.to_json()))) == found

    def test_statements(self):
        lines = many(quarter=(3,))
        lines.append(attempt(lines).to_json())
        state = known(lines)
        assert set(state.certified) == {HALF.name}
        assert state.text(HALF.name) == (
            "With 95% confidence its expected loss on prompts like these is at most 2 points "
            "(200 prompts, mean loss 0)."
        )
        n = prompts_needed(0.005, 0.02, 0.008, binary=True)
        assert state.needed == {QUARTER.name: n}
        assert state.text(QUARTER.name) == (
            f"That its expected loss is at most 2 points is not certified: about {n} new prompts would decide "
            "with 95% confidence if its mean loss stays at 0.5."
        )
        found = recommend.recommend(summarise(lines), certificates=state)
        assert (found.best.setting, found.smaller.setting) == (HALF, QUARTER)
        assert found.text().endswith(
            f"{state.text(HALF.name)} {QUARTER.name} keeps 40% and passes here. {state.text(QUARTER.name)}"
        )
        assert found.about()["certificate"]["prompts"] == 200
        # Expects of two smaller ones the one that is sooner decided, not the smallest.
        eighth = records([1.0] * 197 + [0.0] * 3, Setting("lagkv-std", 0.125), share=0.3)
        assert known(lines + eighth).needed["lagkv-std@0.125,L=128,sink=16"] > n
        found = recommend.recommend(summarise(lines + eighth), certificates=known(lines + eighth))
        assert (found.best.setting, found.smaller.setting) == (HALF, QUARTER)

    def test_no_number_of_prompts(self):
        lines = many(quarter=range(20))
        lines.append(attempt(lines).to_json())
        assert known(lines).needed == {QUARTER.name: None}
        assert "more prompts will not do it if losses stay as measured: a mean loss of 10" in known(
            lines
        ).text(QUARTER.name)
        assert known(lines).text("window@0.5") == "It was not tested for a guarantee."

    def test_too_few_prompts_use_nothing_up(self):
        lines = many(159)
        found = attempt(lines)
        assert (found.level, found.tested) == (0.0, ())
        assert found.reason == "159 new prompts are fewer than the 160 that are needed without any loss"
        lines.append(found.to_json())
        assert "(159 new prompts are fewer than" in known(lines).text(HALF.name)
        # The report has shown these prompts: they are not tested later, and the level is still that of the first.
        assert attempt(lines) is None
        lines += many(159, first=159)
        assert attempt(lines).tested == ()
        later = attempt([*lines, *many(1, first=318)])
        assert (later.prompts, later.level) == (160, pytest.approx(0.04))

    def test_a_second_attempt(self):
        lines = many(160, half=(5,), quarter=(5, 6))
        lines.append(attempt(lines).to_json())
        assert known(lines).certified == {}
        lines += many(240, first=160)
        second = attempt(lines)
        assert (second.prompts, second.level) == (240, pytest.approx(0.008))
        assert [x.certified for x in second.tested] == [True, True]
        # A certified setting stays so, and is not tested again.
        lines.append(second.to_json())
        lines += many(400, first=400, quarter=range(400, 800))
        third = attempt(lines)
        assert (third.level, third.reason) == (0.0, "every setting has its certificate")
        lines.append(third.to_json())
        assert set(known(lines).certified) == {HALF.name, QUARTER.name}

    def test_another_confidence_or_tolerance(self):
        lines = many()
        lines.append(attempt(lines, tolerance=2.0).to_json())
        assert set(known(lines, tolerance=5.0, confidence=0.9).certified) == {HALF.name, QUARTER.name}
        assert known(lines, tolerance=1.0).certified == {}
        assert known(lines, confidence=0.99).certified == {}

    def test_two_orders_share_the_level(self):
        lines = many(160) + records([1.0] * 160, COSINE, share=0.6)
        assert attempt(lines).reason.startswith("160 new prompts are fewer than the 194 ")
        lines = many(194) + records([1.0] * 194, COSINE, share=0.6)
        assert all(x.certified for x in attempt(lines).tested)

    def test_after_a_search_nothing_is_tested(self):
        found = attempt(many(), searched=True)
        assert (found.tested, found.reason) == ((), "the search chose its settings on these prompts")

    def test_samples_with_one_context_are_one_prompt(self):
        lines = [{**x, "context": "the same"} for x in many(200)]
        assert attempt(lines).prompts == 1
        # Under another name it is no new prompt either.
        lines.append(attempt(lines).to_json())
        assert attempt(lines + [{**x, "context": "the same"} for x in many(200, first=200)]) is None

    def test_gains_do_not_make_up_for_losses(self):
        full = [0.5] * 100
        lines = records(full, binary=False)
        lines += records([0.4] * 50 + [0.6] * 50, HALF, binary=False, share=0.6)
        assert known(lines).mean_loss[HALF.name] == pytest.approx(0.05)

    def test_questions_are_averaged_before_losses_are_cut_at_zero(self):
        lines = records([[0.5, 0.5]] * 10, binary=True) + records([[0.0, 1.0]] * 10, HALF, share=0.6)
        assert known(lines).mean_loss[HALF.name] == 0.0
        assert not attempt(lines).binary  # two questions: the mean is no number of 0 or 1

    def test_a_score_that_is_no_number_is_lost(self):
        lines = records([1.0] * 10) + records([1.0] * 9 + [math.nan], HALF, share=0.6)
        assert known(lines).mean_loss[HALF.name] == pytest.approx(0.1)

    def test_what_does_not_count(self):
        lines = many()
        # A task on which the full cache guesses, and a method that the cache does not offer.
        lines += records([0.0] * 50, task="silent", first=1000) + records(
            [0.0] * 50, HALF, task="silent", first=1000
        )
        lines += records([1.0] * 200, Setting("window", 0.5), share=0.6)
        found = attempt(lines)
        assert found.tasks == {"t": 200}
        assert [x.setting for x in found.tested] == [HALF, QUARTER]
        # A setting that was not measured on a task.
        lines = (
            many()
            + records([1.0] * 50, task="u", first=1000)
            + records([1.0] * 50, HALF, task="u", first=1000, share=0.6)
        )
        assert [x.setting for x in attempt(lines).tested] == [HALF]
        assert attempt(records([1.0] * 200)) is None
        assert attempt([]) is None
        lines = records([1.0] * 50) + records([1.0] * 50, task="u", first=100)
        lines += records([1.0] * 50, HALF, share=0.6)
        assert attempt(lines).reason == "no setting was measured on every task"

    def test_prompts_of_silent_tasks_have_been_shown_too(self):
        lines = records([0.0] * 200) + records([0.0] * 200, HALF, share=0.6)
        found = attempt(lines)
        assert (found.level, found.reason) == (
            0.0,
            "the full cache is hardly better than guessing on every task",
        )
        lines.append(found.to_json())
        assert attempt(lines) is None
        assert attempt(lines + many(100, first=200)).prompts == 100

    def test_a_damaged_line_is_named(self):
        line = attempt(many()).to_json()
        del line["tested"][0]["setting"]
        with pytest.raises(EvaluationError, match="a damaged line of kind 'attempt': 'setting'"):
            known([*many(), line])

    def test_files_of_earlier_versions(self):
        lines = [{k: v for k, v in x.items() if k != "context"} for x in many()]
        for x in lines:
            x["questions"] = [{"score": q["score"]} for q in x["questions"]]
        found = attempt(lines)
        assert (found.prompts, found.binary) == (200, False)

    def test_no_tolerance_at_all(self):
        lines = many()
        assert attempt(lines, tolerance=0.0).reason == "no number of prompts decides on a tolerance of 0"
        assert known(lines, tolerance=0.0).needed[HALF.name] is None

    @pytest.mark.parametrize(
        ("confidence", "tolerance"), [(0.0, 2.0), (1.0, 2.0), (math.nan, 2.0), (0.9, -1.0)]
    )
    def test_values_that_make_no_sense(self, confidence, tolerance):
        with pytest.raises(EvaluationError, match="must be"):
            Plan(confidence=confidence, tolerance=tolerance).check()


@pytest.mark.parametrize(
    ("question", "binary"),
    [
        (Question("q", kind="generate", metric="contains"), True),
        (Question("q", kind="generate", metric="f1"), False),
        (Question("q", kind="rank", answers=("a",)), True),
        (Question("q", kind="rank", answers=("a", "b")), False),
        (Question("q", answer="a"), False),
    ],
)
def test_scores_of_zero_or_one(question, binary):
    assert question.binary is binary


def test_an_evaluation_states_its_guarantee(tmp_path):
    """With a tolerance of 100 points a few prompts decide, also for a model that knows nothing."""
    plan = Plan(
        tasks=("fidelity",), methods=("lagkv-std",), keep_ratios=(0.5, 0.25), lag_sizes=(32,), size=150, prompts=2,
        tolerance=100.0,
    )  # fmt: skip
    first = evaluate(tiny_models.loaded(), plan, tmp_path)
    statement = (
        "With 95% confidence its expected loss on prompts like these is at most 100 points (2 prompts, "
    )
    assert statement in first.recommendation.text()
    assert "Guarantee" in first.report.read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["format"], report["version"]) == ("lagkv_ext.evaluation", 1)
    assert report["recommended"]["certificate"]["certified"]
    assert [x["setting"] for x in report["settings"]] == [
        "lagkv-std@0.25,L=32,sink=16",
        "lagkv-std@0.5,L=32,sink=16",
    ]
    assert len(report["attempts"]) == 1
    about = json.loads((tmp_path / "lagkv.json").read_text())["about"]
    assert about["certificate"]["statement"].startswith(statement)
    assert read_settings(tmp_path / "lagkv.json") == report["recommended"]["arguments"]

    ladder = read_ladder(tmp_path / "lagkv-ladder.json")
    assert [x.settings["keep_ratio"] for x in ladder.rungs] == [0.5, 0.25]
    assert ladder.rungs[0].rows > ladder.rungs[1].rows
    assert 0 <= ladder.rungs[1].agreement <= 1
    assert ladder.rungs[1].kl > 0
    assert ladder.model == "tiny"

    # The same prompts are not tested again, whatever the settings.
    evaluate(tiny_models.loaded(), dataclasses.replace(plan, keep_ratios=(0.5, 0.125)), tmp_path)
    report_again(tmp_path / "results.jsonl", tmp_path, tolerance=100.0)
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["attempts"]) == 1
    assert {x["setting"]: x["certificate"]["certified"] for x in report["settings"]} == {
        "lagkv-std@0.5,L=32,sink=16": True,
        "lagkv-std@0.25,L=32,sink=16": True,
        "lagkv-std@0.125,L=32,sink=16": False,
    }
