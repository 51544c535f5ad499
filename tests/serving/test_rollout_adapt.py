"""Versions that servers write: recovery after a trip, and a ratio that follows the traffic along a ladder."""

from __future__ import annotations

import dataclasses
import os
import time

import pytest

pytest.importorskip("numpy", reason="random numbers come from numpy")
pytest.importorskip("transformers", reason="the rollout needs transformers")

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lagkv_ext.serving.rollout import Check, Guard, LadderRules, Policy, Rollout, Store, Variant, adapt
from lagkv_ext.serving.rollout.evidence import Evidence
from lagkv_ext.serving.rollout.policy import Written, rung_of
from lagkv_ext.serving.rollout.store import stamp
from tests.cache.models import SMALL, tiny_config
from tests.serving.rollout_cases import policy, stored
from tests.serving.rollout_processes import at_once, settle

CONFIG = tiny_config("llama")
RUNGS = tuple({**SMALL, "keep": keep} for keep in (6, 4, 2, 1))
HOUR, DAY = 3600.0, 86400.0
GUARD = Guard(min_agreement=0.95, level=0.01, check_share=1.0, recover=True)


def on_rung(rung: int, *, guard: Guard = GUARD, **rules) -> Policy:
    ladder = LadderRules(RUNGS, **{"target_agreement": 0.97, **rules})
    return policy(settings=RUNGS[rung], guard=guard, ladder=ladder)


def server(store: Store) -> Rollout:
    return Rollout(store.path, CONFIG, reload_s=0)


class Clock:
    """The time of all records."""

    def __init__(self, monkeypatch):
        self.now = 1_900_000_000.0
        monkeypatch.setattr(time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class Traffic:
    """Requests whose agreement depends on the rung and on how hard they are; checks of them, as servers add them."""

    def __init__(self, store: Store, rollouts: list[Rollout], seed: int = 0):
        self.store, self.rollouts = store, rollouts
        self.generator = np.random.default_rng(seed)
        self.worst = 1.0  # expected agreement of what was served

    def serve(self, count: int, agreement: list[float]) -> None:
        """``agreement`` by rung."""
        for i in range(count):
            rollout = self.rollouts[i % len(self.rollouts)]
            decision = rollout.cache(request_id=str(i), prompt_tokens=50)
            shadow = decision.reason == "tripped"
            assert decision.wants_check == (decision.compressed or shadow)
            made = self.store.version(decision.version)
            mean = agreement[rung_of(made)]
            if decision.compressed:
                self.worst = min(self.worst, mean)
            found = float(self.generator.binomial(50, mean)) / 50
            Evidence(self.store.checks_of(decision.version)).append(
                Check(found, (1 - found) / 2, 50, 50, shadow=shadow)
            )
            rollout.reload()

    def rungs(self) -> list[int]:
        return [rung_of(self.store.version(n)) for n in self.store.versions()]


EASY, HARD, HOPELESS = [0.999, 0.998, 0.996, 0.99], [0.99, 0.98, 0.96, 0.9], [0.9, 0.8, 0.6, 0.3]


def test_the_ratio_follows_the_traffic(tmp_path, clock):
    """Easy traffic: smaller, as often as a day allows. Hard traffic: larger at once, and not to and fro."""
    store = stored(tmp_path, on_rung(0))
    traffic = Traffic(store, [server(store), server(store)])
    traffic.serve(500, EASY)
    assert traffic.rungs() == [0, 1, 2]  # two a day
    clock.now += DAY + 1
    traffic.serve(400, EASY)
    assert traffic.rungs() == [0, 1, 2, 3]
    clock.now += HOUR
    traffic.serve(150, HARD)
    assert traffic.rungs()[4:] in ([2, 1], [2])  # 0.9 and 0.96 are below the target, 0.98 is above it
    traffic.serve(600, HARD)
    assert traffic.rungs()[4:] == [2, 1]
    assert [x.tripped for x in traffic.rollouts[0].status().variants.values()] == [False, False]
    for number in store.versions()[1:]:
        written = store.version(number).written
        assert written.by == "ladder"
        assert written.evidence["checks"] > 5
        assert "target_agreement 0.97: rung" in written.why
        assert written.time.startswith("2030-")
    # The rung that failed is held back for a day, the smaller one was not tried since.
    clock.now += 23 * HOUR
    traffic.serve(300, EASY)
    assert traffic.rungs()[6:] == []
    clock.now += 2 * HOUR
    traffic.serve(300, EASY)
    assert traffic.rungs()[6:] == [2, 3]


def test_traffic_at_the_edge_does_not_flap(tmp_path, clock):
    """Rung 1 is good and rung 2 is not: each failure doubles the time until the next try."""
    store = stored(tmp_path, on_rung(1, smaller_per_day=24))
    traffic = Traffic(store, [server(store)])
    for _ in range(15):  # days
        for _ in range(2):
            traffic.serve(130, [0.999, 0.998, 0.955, 0.9])
            clock.now += DAY / 2
    tries = traffic.rungs().count(2)
    assert 3 <= tries <= 5  # after 1, 2, 4, 8 days
    assert traffic.rungs()[-1] in (1, 2)
    assert set(traffic.rungs()) <= {1, 2}


def test_hopeless_traffic_trips_and_climbs_unseen_until_checks_are_good(tmp_path, clock):
    """Every request gets the full cache meanwhile, and comes back at the first rung that holds. Here the guard is
    quicker than the ladder, which moves before it otherwise."""
    store = stored(tmp_path, on_rung(3, guard=dataclasses.replace(GUARD, level=0.1), level=1e-4))
    traffic = Traffic(store, [server(store), server(store)])
    agreement = [0.999, 0.7, 0.6, 0.3]
    traffic.serve(30, agreement)
    assert traffic.rungs()[-1] < 3
    served = sum(x.status().variants["lagkv"].decisions["compressed"] for x in traffic.rollouts)
    assert served <= 8  # of rung 3; those of rungs 2 and 1 were checked without a request
    assert traffic.rollouts[1].status().variants["lagkv"].tripped
    traffic.serve(300, agreement)
    assert traffic.rungs() == [3, 2, 1, 0, 0]
    assert traffic.worst == 0.3
    status = traffic.rollouts[0].status().variants["lagkv"]
    assert (status.tripped, status.rung) == (False, 0)
    by = [(x.by, x.why) for n in store.versions()[1:] for x in [store.version(n).written]]
    assert [x for x, _ in by] == ["ladder", "ladder", "ladder", "guard"]
    assert by[-1][1] == "lagkv has recovered: checks without requests are within the guard"
    assert [x.by for n in store.versions() for x in store.trips_of(store.version(n))] == [
        "checks",
        "probation",
        "probation",
        "probation",
    ]


def test_a_ladder_moves_before_the_guard_trips(tmp_path, clock):
    store = stored(tmp_path, on_rung(3))
    traffic = Traffic(store, [server(store)])
    traffic.serve(15, HOPELESS)
    assert traffic.rungs()[:4] == [3, 2, 1, 0]


def test_where_nothing_holds_it_stays_with_the_full_cache(tmp_path, clock):
    store = stored(tmp_path, on_rung(1))
    traffic = Traffic(store, [server(store)])
    traffic.serve(200, HOPELESS)
    assert traffic.rungs() == [1, 0]
    assert traffic.rollouts[0].status().variants["lagkv"].tripped


def test_a_trip_without_recovery_stays(tmp_path, clock):
    """The default: an operator decides, with a ladder too."""
    store = stored(tmp_path, on_rung(1, guard=dataclasses.replace(GUARD, recover=False)))
    rollout = server(store)
    for _ in range(20):
        Evidence(store.checks_of(1)).append(Check(0.2, 0.0, 9, 9))
    rollout.reload()
    decision = rollout.cache(request_id="a", prompt_tokens=50)
    assert (decision.reason, decision.wants_check) == ("tripped", False)
    for _ in range(400):
        Evidence(store.checks_of(1)).append(Check(1.0, 0.0, 9, 9, shadow=True))
    rollout.reload()
    assert (store.versions(), rollout.status().variants["lagkv"].tripped) == ([1], True)


def test_recovery_without_a_ladder_ends_the_trip_of_that_variant_alone(tmp_path):
    variants = {"half": Variant(0.5, RUNGS[1]), "quarter": Variant(0.5, RUNGS[2])}
    store = stored(tmp_path, policy(variants=variants, guard=GUARD))
    rollout = server(store)
    for name in variants:
        for _ in range(9):
            Evidence(store.checks_of(1)).append(Check(0.2, 0.0, 9, 9, variant=name))
    rollout.reload()
    for _ in range(300):
        Evidence(store.checks_of(1)).append(Check(1.0, 0.0, 9, 9, variant="half", shadow=True))
    rollout.reload()
    status = rollout.status()
    assert status.version == 2
    assert {n: x.tripped for n, x in status.variants.items()} == {
        "half": False,
        "quarter": True,
        "full": False,
    }
    assert store.current().content == store.version(1).content
    assert server(store).status().variants["quarter"].tripped


def test_a_trip_by_errors_does_not_recover_on_agreement(tmp_path):
    store = stored(tmp_path, on_rung(1, guard=dataclasses.replace(GUARD, max_errors=1)))
    rollout = server(store)
    rollout.failed(rollout.cache(request_id="a", prompt_tokens=50))
    assert not rollout.cache(request_id="a", prompt_tokens=50).wants_check
    for _ in range(400):
        Evidence(store.checks_of(1)).append(Check(1.0, 0.0, 9, 9, shadow=True))
    rollout.reload()
    assert store.versions() == [1]


# -- what can go wrong


def test_servers_that_find_the_same_write_one_version(tmp_path):
    """Four processes, each with all the evidence, at one moment."""
    store = stored(tmp_path, on_rung(1))
    for _ in range(300):
        Evidence(store.checks_of(1)).append(Check(1.0, 0.0, 9, 9))
    versions = at_once(store.path, *[(settle, 0)] * 4)
    assert versions == [2] * 4
    assert store.versions() == [1, 2]
    assert rung_of(store.current()) == 2


def test_an_operator_who_writes_meanwhile_is_not_overruled(tmp_path):
    store = stored(tmp_path, on_rung(1))
    rollout = server(store)
    force = rollout._watch.force
    store.write(lambda old: dataclasses.replace(old, enabled=False))
    move = adapt.Move("lagkv", RUNGS[2], "ladder", "why", {})
    with pytest.raises(adapt.Overtaken):
        adapt.write(store, force.policy, move)
    assert store.versions() == [1, 2]
    for _ in range(300):
        Evidence(store.checks_of(2)).append(Check(1.0, 0.0, 9, 9))
    rollout.reload()
    assert store.versions() == [1, 2]  # nothing moves while it is off


def test_a_larger_cache_that_cannot_be_written_is_a_trip_and_is_written_later(tmp_path, caplog):
    store = stored(tmp_path, on_rung(2))
    rollout = server(store)
    lock = tmp_path / "lagkv-rollout.lock"
    lock.unlink()
    lock.mkdir()
    for _ in range(60):
        Evidence(store.checks_of(1)).append(Check(0.96, 0.0, 9, 9))  # above the guard, below the target
    rollout.reload()
    assert rollout.cache(request_id="a", prompt_tokens=50).reason == "tripped"
    assert "a version that checks ask for could not be written" in caplog.text
    lock.rmdir()
    rollout.reload()
    assert store.trip().reason.startswith(
        "agreement is below target_agreement 0.97: rung 2 to 1, which could not"
    )


def test_a_rung_that_the_model_does_not_take_is_not_written(tmp_path, caplog):
    rungs = (RUNGS[1], {"layer_keep_ratio": {7: 0.5}}, RUNGS[3])
    store = stored(tmp_path, policy(settings=rungs[0], guard=GUARD, ladder=LadderRules(rungs)))
    rollout = server(store)
    for _ in range(400):
        Evidence(store.checks_of(1)).append(Check(1.0, 0.0, 9, 9))
    for _ in range(3):
        rollout.reload()
    assert store.versions() == [1]
    assert caplog.text.count("could not be written: settings {'layer_keep_ratio': {7: 0.5}}") == 1
    assert rollout.cache(request_id="a", prompt_tokens=50).compressed


MOVES = st.lists(
    st.tuples(st.floats(-3 * DAY, 20 * DAY), st.sampled_from(["smaller", "larger", "guard", "broken"])),
    max_size=12,
)


@given(MOVES, st.integers(1, 3), st.floats(0, 48))
def test_what_holds_back_a_move_to_a_smaller_cache(tmp_path_factory, moves, per_day, hold):
    """By the times in the history, some of them in the future, as after a clock that was set back."""
    made = on_rung(1, smaller_per_day=per_day, hold_hours=hold)
    now, smaller, failures = 2e9, [], []
    history = {}
    for i, (age, kind) in enumerate(moves, 1):
        begin, end = (0, 1) if kind == "smaller" else (2, 1)
        evidence = {"from_rung": begin, "to_rung": end}
        if kind == "larger":
            evidence["failed"] = RUNGS[2]
            failures.append(max(round(age), 0))
        smaller += [max(round(age), 0)] if kind == "smaller" else []
        when = "yesterday" if kind == "broken" else stamp(now - round(age))
        by = "guard" if kind == "guard" else "ladder"
        history[i] = dataclasses.replace(made, version=i, written=Written(by, when, "", evidence))

    class History:
        def versions(self):
            return list(history)

        def version(self, number):
            return history[number]

    allowed = adapt.may_shrink(History(), made.ladder, 2, now)
    full = sum(age < DAY for age in smaller) >= per_day
    held = failures and min(failures) < hold * HOUR * 2 ** min(len(failures) - 1, 6)
    assert allowed == (not full and not held)


def test_the_record_of_a_move_names_the_process(tmp_path):
    store = stored(tmp_path, on_rung(1))
    rollout = server(store)
    for _ in range(20):
        Evidence(store.checks_of(1)).append(Check(0.2, 0.0, 9, 9))
    rollout.reload()
    trip = store.trip()
    assert (trip.by, trip.version, trip.pid) == ("probation", 2, os.getpid())
    assert store.version(2).written.evidence["failed"] == RUNGS[1]
    assert store.trip_of(1).by == "checks"
