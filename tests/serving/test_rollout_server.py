"""``Rollout`` in a server: who gets which cache, what happens when files go wrong, the whole way down and back."""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import tempfile
import threading
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the rollout needs transformers")

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from lagkv_ext import LagKVCache
from lagkv_ext.serving.rollout import (
    Check,
    Guard,
    Rollout,
    RolloutError,
    RolloutStatus,
    Store,
    Trip,
    VariantStatus,
)
from lagkv_ext.serving.rollout.evidence import Evidence
from lagkv_ext.serving.rollout.policy import FULL, bucket
from lagkv_ext.serving.rollout.status import REASONS
from tests.cache.models import SMALL, generate, prompt, tiny_config, tiny_model
from tests.serving.rollout_cases import CHECKS, GUARDS, policy, stored

CONFIG = tiny_config("llama")
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where syncing a file costs nothing
IDS = st.text(max_size=20)


def server(store: Store, **options) -> Rollout:
    return Rollout(store.path, CONFIG, **{"reload_s": 0, **options})


def one(rollout: Rollout, name: str = "lagkv") -> VariantStatus:
    return rollout.status().variants[name]


def reason(rollout: Rollout, request_id: str = "a", prompt_tokens: int = 100) -> str:
    decision = rollout.cache(request_id=request_id, prompt_tokens=prompt_tokens)
    assert decision.compressed == (decision.reason == "compressed")
    assert type(decision.cache) is (LagKVCache if decision.compressed else DynamicCache)
    return decision.reason


# -- the share


@given(IDS, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_only_adds_requests(request_id, a, b):
    small, large = sorted((a, b))
    if policy(share=small).variant_of(request_id) != FULL:
        assert policy(share=large).variant_of(request_id) != FULL
    assert policy(share=1.0).variant_of(request_id) != FULL
    assert policy(share=0.0).variant_of(request_id) == FULL


@given(IDS, st.floats(0, 1))
def test_the_share_is_exactly_that_of_the_buckets(request_id, share):
    from fractions import Fraction

    chosen = policy(share=share).variant_of(request_id) != FULL
    assert chosen == (Fraction(bucket(request_id), 2**64) < Fraction(share))


def test_ids_fall_evenly_and_checks_are_independent_of_the_share():
    """Fixed ids, so a fixed result; the bound is 5 standard deviations, as chance would keep to."""
    names = [f"request-{i}" for i in range(20_000)]
    for share in (0.01, 0.05, 0.5):
        made = policy(share=share, guard=Guard(check_share=0.25))
        chosen = [x for x in names if made.variant_of(x) != FULL]
        assert abs(len(chosen) - 20_000 * share) < 5 * (20_000 * share * (1 - share)) ** 0.5
        checked = sum(made.checks(x) for x in chosen)
        assert abs(checked - len(chosen) * 0.25) < 5 * (len(chosen) * 0.25 * 0.75) ** 0.5


def test_a_bucket_never_changes():
    """Servers of different releases run side by side: other numbers would move requests between caches."""
    assert (bucket("request-1"), bucket("request-1", "check")) == (1225000099930564084, 4519255841264620825)


# -- reasons


def test_every_reason(tmp_path):
    store = stored(tmp_path, policy(share=0.5, min_prompt_tokens=50))
    rollout = server(store)
    inside = next(x for x in "abcdefgh" if policy(share=0.5).variant_of(x) != FULL)
    outside = next(x for x in "abcdefgh" if policy(share=0.5).variant_of(x) == FULL)
    decision = rollout.cache(request_id=inside, prompt_tokens=50)
    assert (decision.version, decision.wants_check, decision.reason) == (1, True, "compressed")
    assert {x.settings.keep for x in decision.cache.layers} == {2}
    assert reason(rollout, outside, 50) == "share"
    assert reason(rollout, inside, 49) == "short_prompt"
    assert reason(rollout, 17, 50) == "error"  # an id that is no text
    store.write(lambda old: dataclasses.replace(old, enabled=False))
    assert reason(rollout, inside, 50) == "disabled"
    store.write(lambda old: dataclasses.replace(old, enabled=True))
    store.record_trip(Trip(3, "why", "now", 1))
    assert reason(rollout, inside, 50) == "tripped"
    status = rollout.status()
    assert set(status.variants) == {"lagkv", "full"}
    counted = {"compressed": 1, "disabled": 1, "tripped": 1, "short_prompt": 1}
    wanted = {**dict.fromkeys(REASONS, 0), **counted}
    assert status.variants["lagkv"] == VariantStatus(0.5, True, wanted, 0, None, None, None, None)
    wanted = {**dict.fromkeys(REASONS, 0), "share": 1, "error": 1}  # no variant was chosen yet
    assert status.variants["full"] == VariantStatus(0.5, False, wanted, 0, None, None, None, None)
    assert dataclasses.replace(status, variants={}) == RolloutStatus(3, True, {}, 0, 0, False, 0)


def test_errors_trip_at_the_limit(tmp_path, caplog):
    store = stored(tmp_path, policy(guard=Guard(max_errors=3)))
    rollout = server(store)
    good = rollout.cache(request_id="a", prompt_tokens=100)
    assert [reason(rollout, "a", None) for _ in range(2)] == ["error"] * 2
    assert "Traceback" in caplog.text
    assert reason(rollout) == "compressed"
    rollout.failed(rollout.cache(request_id="a", prompt_tokens=100))
    assert [reason(rollout), reason(server(store))] == ["tripped"] * 2
    assert store.trip().reason == "3 requests or checks failed in one process (guard.max_errors)"
    store.write(lambda old: dataclasses.replace(old, guard=Guard(max_errors=None)))
    for _ in range(5):
        rollout.failed(good)  # of an earlier version
        assert reason(rollout, "a", None) == "error"
    assert reason(rollout) == "compressed"
    assert rollout.status().failures == 6


# -- the file


def test_it_starts_only_with_a_good_file(tmp_path):
    store = Store(tmp_path / "lagkv-rollout.json")
    with pytest.raises(
        RolloutError, match=r"make one with: lagkv rollout init \S+lagkv-rollout.json --settings"
    ):
        server(store)
    store.path.write_text("{")
    with pytest.raises(RolloutError, match="is not valid JSON"):
        server(store)
    # Ratios that no model refuses but this one: it has three layers.
    store.path.write_text(policy(settings={"layer_keep_ratio": {5: 0.5}}).text)
    with pytest.raises(
        RolloutError, match=r"settings: layer_keep_ratio must hold .* between -3 and 2, got 5"
    ):
        server(store)
    with pytest.raises(RolloutError, match="reload_s must be a number from 0, got -1"):
        server(stored(tmp_path / ".."), reload_s=-1)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda p: p.write_text("{"), "is not valid JSON"),
        (lambda p: p.write_bytes(b"\xff"), "is not UTF-8"),
        (lambda p: (p.unlink(), p.mkdir()), "cannot be read: Is a directory"),
        (
            lambda p: p.write_text(policy(version=2, settings={"keep": 99, "lag_size": 8}).text),
            "keep must be",
        ),
        (lambda p: p.write_text(policy(version=1, share=0.5).text), "must have a version above 1"),
        (lambda p: p.write_text(policy(version=2).text.replace("1.0", "2.0", 1)), "share must be"),
    ],
)
def test_what_cannot_be_used_changes_nothing_and_is_told_once(tmp_path, caplog, change, what):
    store = stored(tmp_path)
    rollout = server(store)
    change(store.path)
    assert [reason(rollout) for _ in range(5)] == ["compressed"] * 5
    told = [x for x in caplog.records if x.levelno == logging.ERROR]
    assert len(told) == 1
    assert what in told[0].getMessage()
    status = rollout.status()
    assert (status.reload_errors, status.version, status.unusable) == (1, 1, True)
    if store.path.is_dir():
        store.path.rmdir()
    store.path.write_text(policy(version=2, enabled=False).text)
    assert reason(rollout) == "disabled"
    status = rollout.status()
    assert (status.reload_errors, status.version, status.unusable) == (1, 2, False)


def test_off_is_obeyed_whatever_its_version_and_gone_means_off(tmp_path):
    store = stored(tmp_path, policy(version=1))
    rollout = server(store)
    kept = store.path.read_text()
    for change in (
        lambda: store.path.unlink(),
        lambda: store.path.write_text(policy(enabled=False, share=0.3).text),
    ):
        change()
        assert reason(rollout) == "disabled"
        status = rollout.status()
        assert (status.enabled, status.version, status.reload_errors) == (False, 1, 0)
        store.path.write_text("{")  # what cannot be used switches nothing on
        assert reason(rollout) == "disabled"
        store.path.write_text(kept)  # back as it was
        assert reason(rollout) == "compressed"
        rollout = server(store)


def test_off_is_obeyed_also_with_settings_that_do_not_fit_the_model(tmp_path):
    """Commands without --model cannot know this: `set --settings` wrote them, and `off` only switches off."""
    store = stored(tmp_path)
    rollout = server(store)
    store.write(lambda old: policy(settings={"layer_keep_ratio": {5: 0.5}}))
    assert reason(rollout) == "compressed"  # by version 1
    store.write(lambda old: dataclasses.replace(old, enabled=False))
    assert [reason(rollout), reason(server(store))] == ["disabled"] * 2
    store.write(lambda old: dataclasses.replace(old, enabled=True))
    assert reason(rollout) == "disabled"
    assert (rollout.status().version, rollout.status().reload_errors) == (3, 2)
    store.write(lambda old: policy())
    assert reason(rollout) == "compressed"


def test_a_trip_record_that_cannot_be_read_means_tripped_and_a_trip_outlives_its_record(tmp_path):
    store = stored(tmp_path)
    rollout = server(store)
    store.tripped().write_text("{")
    assert reason(rollout) == "tripped"
    assert reason(server(store)) == "tripped"
    store.tripped().unlink()
    assert reason(rollout) == "compressed"
    store.record_trip(Trip(1, "why", "now", 1))
    assert reason(rollout) == "tripped"
    store.tripped().unlink()
    assert [reason(rollout), reason(server(store))] == ["tripped"] * 2
    (store.history / "000001.tripped.json").write_text("{")
    assert reason(server(store)) == "tripped"
    store.write(lambda old: old.changed("lagkv", share=0.9))
    late = server(store, reload_s=3600)
    assert [reason(x) for x in (rollout, late)] == ["compressed"] * 2
    store.write(lambda old: old.changed("lagkv", share=0.8))
    store.record_trip(Trip(3, "why", "now", 1))
    store.tripped().unlink()
    late.reload()  # sees the version, and never saw the record
    assert reason(late) == "tripped"


def test_the_file_is_left_alone_between_looks(tmp_path):
    store = stored(tmp_path)
    rollout = server(store, reload_s=3600)
    store.write(lambda old: dataclasses.replace(old, enabled=False))
    assert reason(rollout) == "compressed"
    rollout.reload()
    assert reason(rollout) == "disabled"


def test_threads_see_one_version_at_a_time(tmp_path):
    """Odd versions keep 1 of 8, even ones 2: no decision mixes them, and none is lost or of a version before."""
    store = stored(tmp_path, policy(0.125))
    rollout = server(store)
    stop, wrong, counted = threading.Event(), [], []

    def requests() -> None:
        last = count = 0
        while not stop.is_set():
            decision = rollout.cache(request_id="a", prompt_tokens=9)
            keep = {x.settings.keep for x in decision.cache.layers}
            if decision.version < last or keep != {2 - decision.version % 2}:
                wrong.append((decision.version, last, keep))
            last, count = decision.version, count + 1
        counted.append(count)

    threads = [threading.Thread(target=requests) for _ in range(3)]
    for thread in threads:
        thread.start()
    for version in range(2, 14):
        store.write(lambda old: policy(0.25 if version % 2 == 0 else 0.125))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert one(rollout).decisions["compressed"] == sum(counted)


# -- from end to end


def serve(rollout: Rollout, ids: torch.Tensor, request_id: str = "a"):
    """As a server would: a cache, an answer, and the check where it is wanted."""
    model = tiny_model("llama")
    decision = rollout.cache(request_id=request_id, prompt_tokens=ids.shape[1])
    text = generate(model, ids, decision.cache, new=20)
    check = None
    if decision.wants_check:
        check = rollout.check(model, ids, text[:, ids.shape[1] :], version=decision.version)
    return decision, check


def test_a_destructive_ratio_trips_every_process_and_back_recovers(tmp_path):
    ids = prompt(100)
    store = stored(tmp_path, policy(1.0))
    rollout, other = server(store), server(store)
    decision, check = serve(rollout, ids)
    assert decision.compressed
    assert check == Check(1.0, check.kl, 20, 100, compressed=False)
    assert check.kl < 1e-6
    store.write(lambda old: policy(0.125))
    served = 0
    while not one(rollout).tripped:
        decision, check = serve(rollout, ids)
        assert decision.compressed
        assert check.agreement < 0.9
        assert check.kl > 0.1
        served += 1
    assert served < 10
    late = server(store)  # as after a restart
    for process in (rollout, other, late):
        decision, check = serve(process, ids)
        assert (decision.reason, decision.version, type(decision.cache)) == ("tripped", 2, DynamicCache)
        assert check is None
        status = one(process)
        assert status.tripped
        assert status.agreement < 0.9  # by the first one's checks, which all have read
        assert status.agreement_at_most < 0.97
    trip = store.trip()
    assert (trip.version, trip.pid, trip.checks, trip.by) == (2, os.getpid(), served, "checks")
    store.write(lambda old: store.version(1))
    for process in (rollout, other, late):
        decision, check = serve(process, ids)
        assert (decision.reason, decision.version, check.agreement) == ("compressed", 3, 1.0)
        assert not one(process).tripped


def test_checks_add_up_over_processes_and_only_those_that_say_something(tmp_path):
    """A guard that nothing breaks."""
    store = stored(tmp_path, policy(0.5, guard=Guard(min_agreement=1e-9, max_kl=1e9, check_share=1.0)))
    first, second = server(store), server(store)
    assert one(first).agreement is None
    found = [serve(process, prompt(60, seed=i))[1] for i, process in enumerate((first, second, second))]
    assert all(x.compressed for x in found)
    short = first.check(tiny_model("llama"), prompt(5), prompt(3))
    assert short == Check(1.0, short.kl, 3, 5, compressed=False)
    assert not first.check(tiny_model("llama"), prompt(60), prompt(1)).compressed
    assert [one(x).checks for x in (first, second)] == [1, 2]
    for process in (first, second, server(store)):
        status = one(process)
        assert status.agreement == pytest.approx(sum(x.agreement for x in found) / 3)
        assert status.kl == pytest.approx(sum(x.kl for x in found) / 3)
    store.write(lambda old: old.changed("lagkv", share=0.5))
    status = one(first)  # a version begins without checks; what the process did stays counted
    assert (first.status().version, status.agreement, status.kl, status.checks) == (2, None, None, 1)


@given(st.lists(CHECKS, max_size=40), GUARDS)
def test_a_restart_judges_as_those_that_were_there(checks, guard):
    """Whoever reads the checks one by one, in pieces or all at once: the same checks trip at the same moment."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        store = stored(Path(folder), policy(guard=dataclasses.replace(guard, recover=False)))
        running = server(store)
        for check in checks:
            Evidence(store.checks_of(1)).append(check)
            seen = reason(running)
            assert reason(server(store)) == seen
        trip = store.trip()
        assert (trip is not None) == (reason(running) == "tripped")


def test_where_nothing_can_be_written_a_trip_holds_in_this_process_and_is_written_later(tmp_path, caplog):
    store = stored(tmp_path, policy(0.125))
    rollout = server(store)
    store.checks.touch()  # no folder can be made there, and no file opened that is a folder; not even by root
    lock = tmp_path / "lagkv-rollout.lock"
    lock.unlink()
    lock.mkdir()
    while not one(rollout).tripped:
        _, check = serve(rollout, prompt(100))
        assert check.agreement < 0.9
    assert "could not be shared" in caplog.text
    assert "only this process has fallen back so far" in caplog.text
    told = len(caplog.records)
    assert [reason(rollout), reason(rollout)] == ["tripped"] * 2
    assert len(caplog.records) == told  # the same trouble is told once
    assert store.trip() is None
    lock.rmdir()
    assert reason(rollout) == "tripped"
    assert reason(server(store)) == "tripped"


def test_a_lock_that_nobody_gives_back_holds_up_no_server(tmp_path, caplog):
    """As where an operator has stopped a command with Ctrl-Z: the trip holds here, and is written later."""
    store = stored(tmp_path, policy(guard=Guard(max_errors=1)))
    rollout = server(store)
    with open(tmp_path / "lagkv-rollout.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rollout.failed(rollout.cache(request_id="a", prompt_tokens=100))
        assert one(rollout).tripped
        assert "lagkv-rollout.lock is held by another process" in caplog.text
        with pytest.raises(TimeoutError, match=r"lagkv-rollout\.lock is held by another process"):
            Store(store.path, patience_s=0).write(lambda old: dataclasses.replace(old, enabled=False))
        assert store.trip() is None
    assert reason(rollout) == "tripped"
    assert store.trip().version == 1


def test_a_version_whose_checks_cannot_be_read_begins_all_the_same(tmp_path, caplog):
    """And judges by its own checks, which it keeps apart from those of the version before."""
    guard = Guard(window=1, min_agreement=1e-9, max_kl=1e9, check_share=1.0)
    store = stored(tmp_path, policy(guard=guard))
    rollout = server(store)
    assert serve(rollout, prompt(60))[1].compressed
    store.write(lambda old: policy(0.125))
    store.checks_of(2).mkdir()  # longer than the window, and no file
    rollout.reload()
    assert "the checks of other processes cannot be read" in caplog.text
    while not one(rollout).tripped:
        decision, check = serve(rollout, prompt(100))
        assert (decision.version, decision.reason) == (2, "compressed")
        assert check.agreement < 0.9
    assert [x.name for x in store.checks.iterdir() if x.is_file()] == ["000001.jsonl"]
    assert len(store.checks_of(1).read_text().splitlines()) == 1


def test_a_failing_check_hurts_nobody_and_is_counted(tmp_path, caplog):
    store = stored(tmp_path, policy(guard=Guard(max_errors=2)))
    rollout = server(store)
    model, ids = tiny_model("llama"), prompt(30)
    assert rollout.check(model, ids, ids[:, :0]) is None
    assert "output_ids must be one sequence" in caplog.text
    assert (rollout.status().check_errors, one(rollout).checks, reason(rollout)) == (1, 0, "compressed")
    assert rollout.check(model, ids, ids, version=99) is None  # not in force: nothing to say
    assert rollout.status().check_errors == 1
    assert rollout.check(model, [1, 2], ids) is None
    assert "input_ids must be a tensor of token ids, got list" in caplog.text
    assert reason(rollout) == "tripped"


def test_settings_of_the_file_are_those_of_the_cache(tmp_path):
    wanted = {**SMALL, "keep": 3, "score": "cosine", "layer_keep_ratio": {1: 0.5}, "skip_layers": [-1]}
    rollout = server(stored(tmp_path, policy(settings=wanted)))
    made = rollout.cache(request_id="a", prompt_tokens=1).cache
    assert [x.settings for x in made.layers] == [x.settings for x in LagKVCache(CONFIG, **wanted).layers]
