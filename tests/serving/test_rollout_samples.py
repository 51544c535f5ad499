"""Human review: nothing is stored unasked, what is stored is private, and every verdict counts, whatever stops whom."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
import sys

import pytest

pytest.importorskip("transformers", reason="the rollout needs transformers")
pytest.importorskip("typer", reason="the command needs typer")

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from typer.testing import CliRunner

from lagkv_ext import LagKVCache
from lagkv_ext.commands.cli import app
from lagkv_ext.serving.rollout import Rollout, Samples
from lagkv_ext.serving.rollout import store as store_module
from lagkv_ext.serving.rollout.policy import Policy
from lagkv_ext.serving.rollout.review import printable
from lagkv_ext.serving.rollout.samples import Sample, SampleFolder, Verdict
from tests.cache.models import generate
from tests.evaluate import tiny_models as characters
from tests.serving.rollout_cases import NAMES, policy, stored
from tests.serving.rollout_processes import add_samples, at_once

MODEL, TOKENIZER = characters.model(), characters.tokenizer()
#: Long enough to be compressed, and one to which the two caches give different answers.
TEXT = "The code is 12345. " + "".join(
    chr(32 + int(x)) for x in torch.randint(0, 90, (150,), generator=torch.Generator().manual_seed(4))
)


TINY = {"lag_size": 8, "sink_size": 4, "keep": 1}


def sampling(**changes) -> Policy:
    return policy(settings=TINY, samples=Samples(1.0, **{"max": 5, **changes}))


def server(store, **options) -> Rollout:
    return Rollout(store.path, MODEL.config, reload_s=0, **options)


def take(rollout: Rollout, text: str = TEXT, request_id: str = "a") -> bool:
    ids = TOKENIZER(text, return_tensors="pt")["input_ids"]
    decision = rollout.cache(request_id=request_id, prompt_tokens=ids.shape[1])
    assert decision.wants_sample
    return rollout.sample(
        MODEL, TOKENIZER, ids, version=decision.version, variant=decision.variant, max_new_tokens=8
    )


def folder_of(store) -> SampleFolder:
    return SampleFolder(store, store.current().samples)


def sample(number: int = 1, variant: str = "lagkv") -> Sample:
    return Sample("now", 1, variant, {"keep": 2}, f"prompt {number}", f"full {number}", f"less {number}", 5)


# -- storing


def test_nothing_is_stored_unless_it_was_switched_on(tmp_path):
    store = stored(tmp_path, policy())
    rollout = server(store)
    decision = rollout.cache(request_id="a", prompt_tokens=50)
    assert not decision.wants_sample
    ids = TOKENIZER(TEXT, return_tensors="pt")["input_ids"]
    assert not rollout.sample(MODEL, TOKENIZER, ids, version=1, variant="lagkv")
    store.write(lambda old: dataclasses.replace(old, samples=Samples(0.0)))
    assert not rollout.cache(request_id="a", prompt_tokens=50).wants_sample
    found = {x.name for x in tmp_path.rglob("*") if x.is_file()}
    assert found <= {"lagkv-rollout.json", "lagkv-rollout.lock", "000001.json", "000002.json"}


def test_a_sample_has_both_answers_and_is_private(tmp_path):
    store = stored(tmp_path, sampling())
    before = os.umask(0)
    try:
        assert take(server(store))
    finally:
        os.umask(before)
    folder = folder_of(store)
    (name,) = folder.names()
    found = folder.read(name)
    assert found.prompt == TEXT
    ids = TOKENIZER(TEXT, return_tensors="pt")["input_ids"]
    for answer, cache in (
        (found.full, DynamicCache(config=MODEL.config)),
        (found.compressed, LagKVCache(MODEL.config, **found.settings)),
    ):
        output = generate(MODEL, ids, cache, new=8)
        assert answer == TOKENIZER.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert found.full != found.compressed
    assert (found.version, found.variant, found.settings) == (
        1,
        "lagkv",
        store.current().variants["lagkv"].settings,
    )
    modes = {x.name: stat.S_IMODE(x.stat().st_mode) for x in (folder.path, folder.path / name)}
    assert modes == {"lagkv-samples": 0o700, name: 0o600}


def test_the_users_function_redacts_all_texts_before_anything_is_written(tmp_path, caplog):
    store = stored(tmp_path, sampling())
    seen = []

    def redact(text: str) -> str:
        seen.append(text)
        return text.replace("12345", "[code]").replace(TEXT[:3], "[word]")

    assert take(server(store, redact=redact))
    folder = folder_of(store)
    found = folder.read(folder.names()[0])
    assert "12345" not in found.prompt
    assert seen == [TEXT, seen[1], seen[2]]
    assert len(seen) == 3
    for broken in (lambda text: None, lambda text: 1 / 0):
        assert not take(server(store, redact=broken), request_id="b")
    assert caplog.text.count("a sample could not be made") == 2
    assert "redact must return a string, got NoneType" in caplog.text
    assert len(folder.names()) == 1
    assert "12345" not in "".join(x.read_text() for x in folder.path.iterdir())


def test_the_maximum_holds_among_processes(tmp_path):
    store = stored(tmp_path, sampling(max=7))
    added = at_once(store.path, *((add_samples, me) for me in (1, 2, 3)))
    assert sum(added) == 7
    folder = folder_of(store)
    assert folder.is_full()
    assert len({x.split(".")[0] for x in folder.names()}) == 7
    assert not take(server(store))


def test_a_full_disk_costs_the_sample_and_nothing_else(tmp_path, caplog, monkeypatch):
    store = stored(tmp_path, sampling())
    rollout = server(store)
    assert take(rollout)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "fsync", full)
        assert not take(rollout)
        assert not take(rollout)
    assert caplog.text.count("a sample could not be stored: [Errno 28] No space left on device") == 1
    folder = folder_of(store)
    assert [x.name for x in folder.path.iterdir()] == folder.names()  # nothing half written
    assert rollout.cache(request_id="a", prompt_tokens=50).compressed
    assert take(rollout)


def test_a_disk_that_is_really_full(tmp_path):
    """A process that may write no file of more than 700 bytes: writes end in the middle, as on a full disk."""
    code = """
import pathlib, resource, signal, sys
from tests.serving.test_rollout_samples import *

store = stored(pathlib.Path(sys.argv[1]), sampling(max=50))
rollout = server(store)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
assert take(rollout, TEXT[:30])
assert not take(rollout, TEXT * 20)
assert take(rollout, TEXT[:40])
folder = folder_of(store)
assert [folder.read(x).prompt for x in folder.names()] == [TEXT[:30], TEXT[:40]]
assert len(list(folder.path.iterdir())) == 2
recorded = 0
try:
    while True:
        folder.record(Verdict(folder.names()[0], "lagkv", 1, "same", "me", "full", "now"))
        recorded += 1
except OSError as error:
    print("refused:", error)
assert len(folder.verdicts()) == recorded > 0
assert rollout.cache(request_id="a", prompt_tokens=50).compressed
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout


def test_samples_of_a_version_that_is_gone_are_not_stored(tmp_path):
    store = stored(tmp_path, sampling())
    rollout = server(store)
    ids = TOKENIZER(TEXT, return_tensors="pt")["input_ids"]
    assert not rollout.sample(MODEL, TOKENIZER, ids, version=7, variant="lagkv")
    assert not rollout.sample(MODEL, TOKENIZER, ids, version=1, variant="other")
    assert folder_of(store).names() == []


def test_damaged_samples_and_verdicts_are_left_out(tmp_path, caplog):
    store = stored(tmp_path, sampling())
    folder = folder_of(store)
    name = folder.add(sample())
    good = Verdict(name, "lagkv", 1, "same", "me", "full", "now")
    folder.record(good)
    with (folder.path / "verdicts.jsonl").open("ab") as file:
        file.write(b'{"sample": "x", "verdict": "best"}\nrubbish\n\n{"cut')
    folder.record(good)
    assert folder.verdicts() == [good, good]
    assert len(caplog.records) == 3
    (folder.path / name).write_text("{")
    (folder.path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="is not valid JSON"):
        folder.read(name)
    (folder.path / name).write_text('{"time": "now"}')
    with pytest.raises(ValueError, match="is not usable"):
        folder.read(name)
    assert folder.counts() == {"lagkv": (1, {"same": 2})}


@given(st.lists(st.tuples(NAMES, st.sampled_from(["full", "compressed", "same"])), max_size=6))
def test_counts_are_those_of_the_variants(tmp_path_factory, given_verdicts):
    store = stored(tmp_path_factory.mktemp("samples"), sampling(max=99))
    folder = folder_of(store)
    for variant, verdict in given_verdicts:
        name = folder.add(sample(variant=variant))
        assert folder.read(name) == dataclasses.replace(sample(variant=variant), id=name)
        folder.record(Verdict(name, variant, 1, verdict, "me", "full", "now"))
    wanted = {
        variant: (
            sum(v == variant for v, _ in given_verdicts),
            {x: n for x in ("full", "compressed", "same") if (n := given_verdicts.count((variant, x)))},
        )
        for variant in {v for v, _ in given_verdicts}
    }
    assert folder.counts() == wanted
    status = server(store).status().variants
    for variant in wanted.keys() & status.keys():
        assert (status[variant].samples, status[variant].reviews) == wanted[variant]


# -- reviewing


@pytest.fixture
def reviewed(tmp_path):
    store = stored(tmp_path, sampling(max=20))
    folder = folder_of(store)
    for number in range(6):
        folder.add(sample(number))
    return store


def review(store, keys: str, *arguments: object, status: int = 0) -> str:
    command = ["rollout", "review", "--file", str(store.path), *map(str, arguments)]
    done = CliRunner().invoke(app, command, input=keys)
    assert done.exit_code == status, done.output
    return done.output


def test_a_review_is_blind_and_in_random_order(reviewed):
    """Whoever reads it cannot tell which answer is whose, and "1" is not always the same cache."""
    said = review(reviewed, "1\n" * 6, "--reviewer", "ada")
    assert "6 verdicts recorded, 0 samples left for ada" in said
    assert "lagkv" not in said.replace("lagkv-rollout", "")
    for number in range(6):
        assert (
            said.count(f"prompt {number}\n")
            == said.count(f"full {number}\n")
            == said.count(f"less {number}\n")
            == 1
        )
    verdicts = folder_of(reviewed).verdicts()
    assert sorted(x.sample for x in verdicts) == folder_of(reviewed).names()
    assert all(x.verdict == x.first for x in verdicts)  # the first one was always chosen
    orders, firsts = set(), set()
    for i in range(12):
        said = review(reviewed, "1\n" * 6, "--reviewer", f"reviewer {i}")
        orders.add(tuple(x for x in said.split() if x.isdigit() and len(x) == 1))
    firsts = {x.first for x in folder_of(reviewed).verdicts()}
    assert firsts == {"full", "compressed"}
    assert len(orders) > 1


def test_a_reviewer_who_stops_in_the_middle_goes_on_there(reviewed):
    for keys, recorded, left in (("1\nx\n2\nq\n", 2, 4), ("s\n", 1, 3), ("k\nk\ns\n", 1, 2), ("", 0, 2)):
        said = review(reviewed, keys, "--reviewer", "ada")  # the input ends without q
        assert f"{recorded} verdicts recorded, {left} samples left for ada" in said
    assert "0 verdicts recorded, 6 samples left for bob" in review(reviewed, "q\n", "--reviewer", "bob")
    assert "1 verdicts recorded, 1 samples left for ada" in review(
        reviewed, "2\n", "--reviewer", "ada", "--count", 1
    )
    samples = [x.sample for x in folder_of(reviewed).verdicts()]
    assert len(set(samples)) == len(samples) == 5
    shown = json.loads(
        CliRunner().invoke(app, ["rollout", "show", "--json", "-f", str(reviewed.path)]).output
    )
    assert shown["now"]["lagkv"]["samples"] == 6
    assert sum(shown["now"]["lagkv"]["reviews"].values()) == 5


def test_only_what_is_asked_for(reviewed):
    folder_of(reviewed).add(dataclasses.replace(sample(9, "eighth"), prompt="x" * 50 + "end"))
    said = review(reviewed, "s\n" * 9, "--variant", "eighth", "--reviewer", "ada", "--characters", 10)
    assert "1 verdicts recorded" in said
    assert "[43 characters before]\nxxxxxxxend\n" in said
    reviewed.write(lambda old: dataclasses.replace(old, samples=None))
    assert "stores no samples: switch them on" in review(reviewed, "", status=2)


def test_text_of_users_cannot_control_the_terminal():
    assert printable("a\tb\nc\x1b[2J\x07d\u202ee é 漢") == "a\tb\nc\\x1b[2J\\x07d\\u202ee é 漢"
