"""The rollout file and its history: read as written, versions only grow, nothing is lost, whoever writes at once."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the rollout needs transformers")

from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lagkv_ext.serving.rollout import Check, RolloutError, Store, Trip
from lagkv_ext.serving.rollout.evidence import Evidence
from lagkv_ext.serving.rollout.policy import parse
from tests.serving.rollout_cases import CHECKS, POLICIES, policy, stored
from tests.serving.rollout_processes import add_checks, at_once, count_up, kill_while, read_until, trip

# Folder where syncing a file costs nothing.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@given(POLICIES, st.integers(1, 10**9))
def test_a_policy_is_read_as_it_was_written(made, version):
    made = dataclasses.replace(made, version=version)
    assert parse(made.text, "here") == made


class Operators(RuleBasedStateMachine):
    """Operators and servers do anything in any order; the model is a plain list of what was written."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY)
        self.store = Store(Path(self.folder.name) / "lagkv-rollout.json")
        self.written: dict[int, dict] = {}
        self.trips: dict[tuple[int, str], str] = {}  # reasons by version and variant
        self.usable = False  # whether the file is there and whole

    def teardown(self):
        self.folder.cleanup()

    def _wrote(self, old, new):
        if old is new:
            assert old.version == max(self.written)
            assert self.usable
            assert not self.tripped(old.version)
            return
        assert new.version == max(self.written, default=0) + 1
        self.written[new.version] = new.content
        self.usable = True

    def names(self, number):
        """The variants of a version."""
        return [x for x in self.written[number].get("variants", ["lagkv"]) if x != "full"]

    def tripped(self, number):
        return {variant for version, variant in self.trips if version == number}

    @rule(made=POLICIES)
    def write(self, made):
        if self.usable or not self.store.path.exists():
            self._wrote(*self.store.write(lambda old: made))
        else:
            with pytest.raises(RolloutError):
                self.store.write(lambda old: made)

    @precondition(lambda self: self.written)
    @rule()
    def off(self):
        old, new = self.store.write(lambda old: dataclasses.replace(old, enabled=False), over=True)
        self._wrote(old, new)
        assert new.content == {**self.written[max(self.written)], "enabled": False}

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def back(self, data):
        number = data.draw(st.sampled_from(sorted(self.written)))
        self._wrote(*self.store.write(lambda old: self.store.version(number), over=True))

    @precondition(lambda self: self.written)
    @rule(data=st.data(), reason=st.text(max_size=9))
    def trip(self, data, reason):
        number = data.draw(st.sampled_from(sorted(self.written)))
        name = data.draw(st.sampled_from(self.names(number)))
        stands = self.store.record_trip(Trip(number, reason, "now", 1, variant=name))
        if self.usable and number == max(self.written):
            self.trips.setdefault((number, name), reason)
            assert (stands.version, stands.reason) == (number, self.trips[number, name])
            assert self.store.trip_of(number, name) == stands

    @precondition(lambda self: self.usable)
    @rule(data=st.data(), share=st.floats(0, 0.25))
    def change_one(self, data, share):
        """Trips of the other variants go on."""
        number = max(self.written)
        name = data.draw(st.sampled_from(self.names(number)))
        held = {x: self.trips[number, x] for x in self.tripped(number) - {name}}
        old, new = self.store.write(
            lambda old: old.changed(name, share=old.variants[name].share * share), anew=(name,)
        )
        self._wrote(old, new)
        if old is not new:
            self.trips |= {(new.version, x): reason for x, reason in held.items()}

    @precondition(lambda self: self.usable)
    @rule(data=st.data())
    def put_on_probation(self, data):
        number = max(self.written)
        name = data.draw(st.sampled_from(self.names(number)))
        trip = Trip(number, "probation", "now", 1, variant=name, by="probation")
        old, new = self.store.write(
            lambda old: dataclasses.replace(old, enabled=not old.enabled), probation=trip
        )
        self._wrote(old, new)
        self.trips[new.version, name] = "probation"

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def forget_the_record(self, data):
        name = data.draw(st.sampled_from(self.names(max(self.written))))
        self.store.tripped(name).unlink(missing_ok=True)

    @precondition(lambda self: self.usable)
    @rule(rubbish=st.none() | st.binary(max_size=20))
    def damage(self, rubbish):
        self.usable = False
        if rubbish is None:
            self.store.path.unlink()
        else:
            self.store.path.write_bytes(rubbish)

    @precondition(lambda self: self.written)
    @rule(made=POLICIES)
    def dry_run(self, made):
        before = sorted(x.name for x in self.store.path.parent.rglob("*"))
        self.store.write(lambda old: made, over=True, dry_run=True)
        assert sorted(x.name for x in self.store.path.parent.rglob("*")) == before

    @invariant()
    def history_is_complete(self):
        assert self.store.versions() == sorted(self.written)
        assert {n: self.store.version(n).content for n in self.written} == self.written
        if self.usable:
            current = self.store.current()
            assert current.version == max(self.written)
            assert current.content == self.written[current.version]
            trips = self.store.trips_in_force(current)
            found = {(x.version, name): x.reason for name, x in trips.items()}
            assert found == {k: reason for k, reason in self.trips.items() if k[0] == current.version}

    @invariant()
    def nothing_temporary_stays(self):
        assert not [x.name for x in self.store.path.parent.rglob(".*")]


TestOperators = Operators.TestCase


def test_a_file_made_by_hand_comes_into_the_history(tmp_path):
    store = Store(tmp_path / "lagkv-rollout.json")
    store.path.write_text(policy(version=7).text)
    old, new = store.write(lambda old: old.changed("lagkv", share=0.5))
    assert (old.version, new.version, store.versions()) == (7, 8, [7, 8])
    assert store.version(7) == policy(version=7)


def test_a_trip_record_that_cannot_be_read_is_doubt_and_goes_with_the_next_version(tmp_path):
    store = stored(tmp_path)
    store.tripped().write_text("{")
    with pytest.raises(RolloutError, match="is not valid JSON"):
        store.trip()
    old, new = store.write(
        lambda old: old
    )  # the same content, yet a new version: the old one may have tripped
    assert (old.version, new.version) == (1, 2)
    assert store.trip() is None
    store.tripped().write_text("{")
    assert store.record_trip(Trip(2, "why", "now", 1)) == store.trip()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o600, 0o664])
def test_a_new_version_is_readable_for_those_who_read_the_old_one(tmp_path, mode):
    """Whatever the umask of the operator: servers that cannot read "off" go on compressing."""
    store = stored(tmp_path)
    store.path.chmod(mode)
    owner = 65534 if os.geteuid() == 0 else os.geteuid()
    os.chown(store.path, owner, -1)
    before = os.umask(0o077)
    try:
        store.write(lambda old: dataclasses.replace(old, enabled=False))
    finally:
        os.umask(before)
    found = store.path.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (mode, owner)


# -- several processes


def test_a_writer_that_is_killed_at_any_point_loses_nothing(tmp_path):
    """A version in force is in the history after the next write, the numbers grow, and nobody waits for the dead."""
    store = stored(tmp_path, policy(min_prompt_tokens=0))
    in_force = {1: 0}
    for delay in range(12):
        kill_while(store.path, count_up, 10**6, after=delay / 1000)
        found = store.current()
        assert found.version >= max(in_force)
        in_force[found.version] = found.min_prompt_tokens
        _, new = store.write(
            lambda old: dataclasses.replace(old, min_prompt_tokens=old.min_prompt_tokens + 1)
        )
        in_force[new.version] = new.min_prompt_tokens
        counts = {n: store.version(n).min_prompt_tokens for n in store.versions()}
        assert in_force.items() <= counts.items()
        # Each version was made from the one before it, so nothing is in the history that never was in force.
        assert list(counts.values()) == list(range(len(counts)))


def test_processes_that_write_at_once_lose_nothing_and_readers_see_whole_files(tmp_path):
    store = stored(tmp_path, policy(min_prompt_tokens=0))
    at_once(store.path, (read_until, 1 + 4 * 10), *[(count_up, 10)] * 4)
    assert [store.version(n).min_prompt_tokens for n in store.versions()] == list(range(41))
    assert store.current() == store.version(41)


def test_of_processes_that_trip_at_once_one_wins(tmp_path):
    for i in range(5):
        (tmp_path / str(i)).mkdir()
        store = stored(tmp_path / str(i))
        winner, *others = at_once(store.path, *((trip, me) for me in range(1, 5)))
        assert others == [winner] * 3
        assert store.trip() == store.trip_of(1) == Trip(1, f"process {winner}", "now", winner)


def test_checks_that_processes_add_at_once_are_seen_by_all_in_one_order(tmp_path):
    store = stored(tmp_path)
    watching = Evidence(store.checks_of(1))
    at_once(store.path, *((add_checks, me) for me in (1, 2, 3)))
    seen = [(x.tokens, x.kl) for x in watching.new()]
    assert watching.new() == []
    assert sorted(seen) == [(me, i) for me in (1, 2, 3) for i in range(100)]
    assert seen == [(x.tokens, x.kl) for x in Evidence(store.checks_of(1)).new()]


@given(st.lists(CHECKS, max_size=30))
def test_checks_are_read_as_they_were_written(checks):
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        path = Path(folder) / "checks" / "000001.jsonl"
        writer = Evidence(path)
        for check in checks:
            writer.append(check)
        assert writer.new() == checks
        assert Evidence(path).new() == checks
        assert all(len(line) < 256 for line in path.read_bytes().splitlines()) if checks else True


def test_a_line_that_a_full_disk_cut_off_takes_no_other_with_it(tmp_path, caplog):
    evidence = Evidence(tmp_path / "000001.jsonl")
    good = Check(0.5, 0.0, 1, 1)
    evidence.append(good)
    with evidence.path.open("ab") as file:
        file.write(b'{"agreement": 0.')
    evidence.append(good)
    assert evidence.new() == [good, good]
    assert len(caplog.records) == 1
    assert Evidence(evidence.path).new() == [good, good]


@example(["add", "read", "empty", "add"])
@example(["add", "read", "delete", "add", "add"])
@given(st.lists(st.sampled_from(["add", "read", "empty", "delete"]), max_size=30))
def test_a_file_of_checks_that_somebody_cleared_is_followed_from_its_beginning(actions):
    """Else a breaker would see nothing until the file has grown to what it was."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        path = Path(folder) / "checks" / "000001.jsonl"
        writer, reader = Evidence(path), Evidence(path)
        unread = []
        for i, action in enumerate([*actions, "read"]):
            if action == "add":
                unread.append(Check(0.5, 0.0, 1 + i, 1))
                writer.append(unread[-1])
            elif action == "read":
                assert reader.new() == unread
                unread = []
            elif path.exists():
                unread = []
                path.unlink() if action == "delete" else path.write_bytes(b"")


def test_checks_that_cannot_be_read_are_said_to_be_so_and_read_later(tmp_path):
    path = tmp_path / "000001.jsonl"
    path.mkdir()
    (path / "x").touch()
    evidence = Evidence(path)
    with pytest.raises(IsADirectoryError):
        evidence.new()
    (path / "x").unlink()
    path.rmdir()
    evidence.append(Check(0.5, 0.0, 1, 1))
    assert evidence.new() == [Check(0.5, 0.0, 1, 1)]


def test_a_line_that_is_no_check_is_left_out(tmp_path, caplog):
    evidence = Evidence(tmp_path / "000001.jsonl")
    good = {"agreement": 1, "kl": None, "tokens": 1, "prompt_tokens": 1}
    lines = [{**good, "agreement": 2}, {**good, "kl": -1}, {**good, "tokens": 0}, {"agreement": 1}, good]
    evidence.path.write_text("rubbish\n" + "".join(json.dumps(x) + "\n" for x in lines) + '{"agreement')
    assert [x.kl for x in evidence.new()] == [float("inf")]
    assert len(caplog.records) == 5
    assert evidence.new() == []
