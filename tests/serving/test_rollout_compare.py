"""Variants side by side: intervals that hold at every look, and what is left out is left out for a reason."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest

pytest.importorskip("numpy", reason="random numbers come from numpy")
pytest.importorskip("transformers", reason="the rollout needs transformers")
pytest.importorskip("typer", reason="the command needs typer")

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lagkv_ext.commands.cli import app
from lagkv_ext.serving.rollout import Check, Samples, Variant
from lagkv_ext.serving.rollout.compare import _boundary, difference, observe, sign_test
from lagkv_ext.serving.rollout.evidence import Evidence
from lagkv_ext.serving.rollout.samples import Sample, SampleFolder, Verdict
from tests.cache.models import SMALL
from tests.serving.rollout_cases import policy, stored

HALF, QUARTER = ({**SMALL, "keep_ratio": ratio} for ratio in (0.5, 0.25))
RUNS, STEPS = 600, 1500


def two():
    return policy(variants={"half": Variant(0.4, HALF), "quarter": Variant(0.4, QUARTER)})


def ever_apart(first: np.ndarray, second: np.ndarray, level: float) -> float:
    """Share of the runs ``[runs, steps]`` in which the interval excludes 0 at any look, from 30 numbers on."""
    count = np.arange(1, first.shape[1] + 1)
    sums = [np.cumsum(x, axis=1) for x in (first, second)]
    squares = [np.cumsum(x * x, axis=1) for x in (first, second)]
    variances = [(q - s * s / count) / np.maximum(count - 1, 1) for q, s in zip(squares, sums, strict=True)]
    error = np.sqrt(sum(x / count for x in variances))
    width = error * np.array([_boundary(2 * n, level) for n in count])
    apart = np.abs(sums[1] / count - sums[0] / count) > width
    return float(apart[:, 29:].any(axis=1).mean())


@pytest.mark.parametrize("kind", ["agreement", "duration"])
def test_equal_variants_are_called_different_less_often_than_the_level(kind):
    """Looked at after every number, for 1,500 numbers each; skewed and heavy distributions."""
    generator, level = np.random.default_rng(0), 0.1
    shape = (2, RUNS, STEPS)
    values = generator.beta(30, 1, shape) if kind == "agreement" else generator.lognormal(0, 0.7, shape)
    rate = ever_apart(*values, level)
    assert rate <= level + 5 * math.sqrt(level * (1 - level) / RUNS)
    assert rate > 0.005, "a rate this small would not show a broken promise"


def test_a_fixed_interval_would_be_wrong_more_often():
    """The same simulation with 1.64 standard errors, as for a single look, fails."""
    generator = np.random.default_rng(0)
    first, second = generator.lognormal(0, 0.7, (2, RUNS, STEPS))
    count = np.arange(1, STEPS + 1)
    difference_ = np.cumsum(second - first, axis=1) / count
    error = np.sqrt((first.var() + second.var()) / count)
    assert (np.abs(difference_) > 1.64 * error)[:, 29:].any(axis=1).mean() > 0.3


def test_a_difference_is_found():
    generator = np.random.default_rng(1)
    first, second = (list(generator.normal(mean, 0.02, 300)) for mean in (0.99, 0.975))
    found = difference("agreement", ("half", "quarter"), (first, second), 0.05)
    assert found.verdict == "lower"
    assert found.low < -0.015 < found.high < 0
    assert difference("agreement", ("quarter", "half"), (second, first), 0.05).verdict == "higher"
    assert difference("agreement", ("a", "b"), (first, first), 0.05).verdict == "noise"


@given(st.integers(60, 10**6), st.floats(1e-6, 0.5))
def test_the_interval_is_wider_than_that_of_one_look_and_narrows(count, level):
    from statistics import NormalDist

    assert _boundary(count, level) > NormalDist().inv_cdf(1 - level / 2)
    assert _boundary(4 * count, level) / 2 < _boundary(count, level)
    assert _boundary(count, level / 2) > _boundary(count, level)


@given(
    st.lists(st.floats(0, 1) | st.just(math.inf), max_size=40),
    st.lists(st.floats(0, 1) | st.just(math.inf), max_size=40),
)
def test_too_few_or_infinite_numbers_have_no_interval(first, second):
    found = difference("kl", ("a", "b"), (first, second), 0.05)
    known = min(len(first), len(second)) >= 30 and all(map(math.isfinite, [*first, *second]))
    assert (found.verdict != "too few") == known
    assert found.counts == (len(first), len(second))


@given(st.integers(0, 9), st.integers(0, 9))
def test_the_sign_test_is_exact(better, worse):
    count = better + worse
    at_least = abs(better - worse)
    extreme = sum(abs(2 * sum(x) - count) >= at_least for x in itertools.product((0, 1), repeat=count))
    assert sign_test(better, worse) == pytest.approx(extreme / 2**count)


# -- what is observed


def add(store, number: int, variant: str, agreement: float, *, times: int = 1, **more) -> None:
    for _ in range(times):
        Evidence(store.checks_of(number)).append(Check(agreement, 0.01, 9, 9, variant=variant, **more))


def test_checks_of_earlier_versions_count_while_the_settings_are_the_same(tmp_path):
    store = stored(tmp_path, two())
    add(store, 1, "half", 0.9)
    add(store, 1, "quarter", 0.8)
    store.write(lambda old: old.changed("half", share=0.1))
    add(store, 2, "half", 0.91)
    store.write(lambda old: old.changed("quarter", settings={**SMALL, "keep": 1}))
    add(store, 3, "half", 0.92, times=2)
    add(store, 3, "half", 0.1, shadow=True)  # of a request that was not compressed
    add(store, 3, "gone", 0.1)
    found = observe(store, store.current(), []).values["agreement"]
    assert found == {"half": [0.92, 0.92, 0.91, 0.9], "quarter": [], "full": []}


def record(**changes) -> str:
    data = {
        "event": "request",
        "outcome": "completed",
        "eligible": True,
        "reason": "compressed",
        "variant": "half",
        "settings": HALF,
        "duration_s": 1.5,
        "bytes_held": 100,
    }
    return json.dumps({**data, **changes}) + "\n"


def test_logged_requests_count_where_they_got_the_cache_of_their_variant(tmp_path):
    store = stored(tmp_path, two())
    log = tmp_path / "requests.jsonl"
    log.write_text(
        record()
        + record(variant="full", reason="share", settings=None, duration_s=2.5)
        + record(outcome="failed")
        + record(eligible=False)
        + record(reason="tripped", settings=None)
        + record(settings=QUARTER)
        + record(variant="full", reason="disabled", settings=None)
        + record(variant="gone")
        + record(event="other")
        + record(duration_s=None, bytes_held=7)
        + record(duration_s="1", bytes_held=True)
        + "\n[1]\n{cut"
    )
    found = observe(store, store.current(), [log])
    assert found.values["duration_s"] == {"half": [1.5], "quarter": [], "full": [2.5]}
    assert found.values["bytes_held"] == {"half": [100.0, 7.0], "quarter": [], "full": [100.0]}
    assert found.left_out == [f"1 damaged lines of {log}"]


# -- the command


def compare(store, *arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["rollout", "compare", "--file", str(store.path), *map(str, arguments)])
    assert done.exit_code == status, done.output
    return done.output


def test_the_command_says_what_is_noise(tmp_path):
    made = dataclasses.replace(two(), samples=Samples(1.0))
    store = stored(tmp_path, made)
    assert "nothing to compare" in compare(store)
    generator = np.random.default_rng(0)
    for _ in range(60):
        add(store, 1, "half", float(generator.beta(99, 1)))
        add(store, 1, "quarter", float(generator.beta(9, 1)))
    log = tmp_path / "requests.jsonl"
    with log.open("w") as file:
        for _ in range(40):
            file.write(
                record(duration_s=float(generator.exponential(1.0)), bytes_held=100 + generator.random())
            )
            full = {"variant": "full", "reason": "share", "settings": None}
            file.write(
                record(
                    duration_s=float(generator.exponential(1.0)), bytes_held=400 + generator.random(), **full
                )
            )
        file.write(record(variant="quarter", settings=QUARTER) + "{damaged\n")
    folder = SampleFolder(store, made.samples)
    for i in range(12):
        name = folder.add(Sample("now", 1, "half", {}, "p", "a", "b", 1))
        folder.record(Verdict(name, "half", 1, "full" if i < 10 else "same", "ada", "full", "now"))
    said = compare(store, "--log", log)
    lines = {": ".join(x.split(": ")[:2]): x for x in said.splitlines()}
    assert "left out: 1 damaged lines" in said
    assert lines["agreement: quarter - half"].count("lower (0.9") == 1
    assert " of 60, 0.98" in lines["agreement: quarter - half"]
    assert ", noise (" in lines["duration_s: half - full"]
    assert " s, " in lines["duration_s: half - full"]
    assert "bytes, lower (100" in lines["bytes_held: half - full"]
    assert "duration_s: quarter - full: too few (1 and 40)\n" in said
    assert (
        "reviews of half: full 10, compressed 0, same 2; a difference (p 0.002, once, at the end)\n" in said
    )
    data = json.loads(compare(store, "--json", "--level", 0.01))
    assert data["level"] == 0.01
    (agreement, kl) = data["differences"]
    assert (agreement["metric"], agreement["verdict"], agreement["counts"]) == (
        "agreement",
        "lower",
        [60, 60],
    )
    assert (kl["metric"], kl["verdict"]) == ("kl", "noise")
    assert data["reviews"]["half"]["full"] == 10
    assert "No such file" in compare(store, "--log", tmp_path / "none.jsonl", status=2)
