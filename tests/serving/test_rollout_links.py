"""The rollout file by several names: everybody who means the same file is reached, by whatever symbolic link."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the rollout needs transformers")
pytest.importorskip("typer", reason="the command needs typer")

from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lagkv_ext.commands.cli import app
from lagkv_ext.serving.rollout import Check, Guard, Policy, Rollout, RolloutError, Store, Trip
from lagkv_ext.serving.rollout.evidence import Evidence
from lagkv_ext.serving.rollout.store import mounted_by_itself, target_of
from tests.cache.models import tiny_config
from tests.serving.rollout_cases import policy, stored

CONFIG = tiny_config("llama")
#: Kinds of each name after the first: a link with a relative or an absolute target, or a name in a linked folder.
KINDS = st.lists(st.sampled_from(["relative", "absolute", "folder"]), min_size=1, max_size=4)


def add_name(path: Path, kind: str, number: int) -> Path:
    """Another name of the file ``path``, in a folder of its own."""
    folder = path.parents[1] / f"folder{number}"
    if kind == "folder":
        folder.symlink_to(path.parent)
        return folder / path.name
    folder.mkdir()
    link = folder / f"link{number}.json"
    link.symlink_to(Path("..", path.parent.name, path.name) if kind == "relative" else path)
    return link


def named(root: Path, kinds: list[str]) -> list[Path]:
    """The names of one rollout file, each a link to the one before."""
    (root / "real").mkdir()
    names = [stored(root / "real").path]
    for number, kind in enumerate(kinds):
        names.append(add_name(names[-1], kind, number))
    return names


def server(name: Path) -> Rollout:
    return Rollout(name, CONFIG, reload_s=0)


def reason(rollout: Rollout) -> str:
    return rollout.cache(request_id="a", prompt_tokens=100).reason


def command(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["rollout", *map(str, arguments)])
    assert done.exit_code == status, done.output
    return done.output


@given(KINDS, st.integers(0, 4), st.integers(0, 4))
@example(["relative"], 1, 1)
@example(["absolute", "relative", "folder", "relative"], 4, 4)
def test_off_and_trips_reach_everybody_by_any_name(kinds, writes, finds):
    with tempfile.TemporaryDirectory() as folder:
        names = named(Path(folder), kinds)
        writer, finder = (names[min(i, len(kinds))] for i in (writes, finds))
        links = [name for name in names if name.is_symlink()]
        servers = [server(name) for name in names]
        assert {reason(x) for x in servers} == {"compressed"}
        command("off", "--file", writer)
        assert {reason(x) for x in servers} == {"disabled"}
        command("on", "--file", names[0])
        assert {reason(x) for x in servers} == {"compressed"}
        Store(finder).record_trip(Trip(3, "why", "now", 1))
        assert {reason(x) for x in (*servers, *map(server, names))} == {"tripped"}
        command("set", "--share", 0.9, "--file", writer)
        assert {x.status().version for x in servers} == {4}
        assert all(name.is_symlink() for name in links)
        found = {x.name for x in Path(folder, "real").iterdir()}
        assert found == {"lagkv-rollout.json", "lagkv-rollout.history", "lagkv-rollout.lock"}
        assert [
            x for x in Path(folder).glob("folder*/*") if x not in names and not x.parent.is_symlink()
        ] == []


def test_checks_by_any_name_judge_one_version(tmp_path):
    names = named(tmp_path, ["relative"])
    servers = [server(name) for name in names]
    for name in names * 4:
        Evidence(Store(name).checks_of(1)).append(Check(0.1, 9.0, 5, 50))
    assert [reason(x) for x in servers] == ["tripped"] * 2


def test_a_link_to_nothing_is_where_init_makes_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lagkv.json").write_text('{"keep_ratio": 0.5, "lag_size": 8, "sink_size": 4}')
    Path("elsewhere").mkdir()
    link = Path("link.json")
    link.symlink_to("elsewhere/rollout.json")
    for name in ("on", "show"):
        assert "there is no rollout file link.json" in command(name, "--file", link, status=2)
    assert "neither the file nor in" in command("off", "--file", link, status=2)
    with pytest.raises(RolloutError, match="there is no rollout file"):
        server(link)
    said = command("init", link, "--share", 1)
    assert f"link.json (a link to {tmp_path / 'elsewhere' / 'rollout.json'}): version 1 written" in said
    rollout = server(link)
    assert reason(rollout) == "compressed"
    Path("elsewhere/rollout.json").unlink()
    assert reason(rollout) == "disabled"  # gone means off
    assert "version 2 written" in command("off", "--file", link)  # from the history, beside the file itself
    assert Path("elsewhere/rollout.json").exists()


def test_links_that_lead_nowhere_are_refused_and_keep_the_version_in_force(tmp_path, caplog):
    store = stored(tmp_path)
    link, other = tmp_path / "link.json", tmp_path / "other.json"
    link.symlink_to(store.path)
    rollout = server(link)
    link.unlink()
    link.symlink_to(other)
    other.symlink_to(link)
    assert [reason(rollout), reason(rollout)] == ["compressed"] * 2
    status = rollout.status()
    assert (status.unusable, status.reload_errors) == (True, 1)
    assert "Too many levels of symbolic links; the version in force stays" in caplog.text
    with pytest.raises(RolloutError, match="cannot be read: Too many levels of symbolic links"):
        server(link)
    assert "Too many levels of symbolic links" in command("off", "--file", link, status=2)
    link.unlink()
    link.symlink_to(store.path)
    command("off", "--file", store.path)
    assert reason(rollout) == "disabled"
    assert not rollout.status().unusable


def switch(link: Path, target: Path) -> None:
    """At one moment, as Kubernetes does with the folders of a ConfigMap."""
    temporary = link.with_name("new")
    temporary.symlink_to(target)
    os.replace(temporary, link)


@pytest.mark.parametrize("folders", [False, True])
def test_a_link_that_leads_elsewhere_is_followed_with_its_trips_and_checks(tmp_path, folders):
    """Also where a folder on the way is the link."""
    stores = []
    for number in (1, 2, 3):
        (tmp_path / f"data{number}").mkdir()
        stores.append(stored(tmp_path / f"data{number}", policy(guard=Guard(window=9))))
    first, second, third = stores
    second.write(lambda old: old.changed("lagkv", share=0.9))
    link = tmp_path / "current"
    name = link / first.path.name if folders else link
    targets = [x.path.parent if folders else x.path for x in stores]
    link.symlink_to(targets[0])
    rollout = server(name)
    assert reason(rollout) == "compressed"
    switch(link, targets[2])  # the same version and content: checks are those of the new place
    for _ in range(6):
        Evidence(third.checks_of(1)).append(Check(0.1, 0.0, 5, 50))
    assert reason(rollout) == "tripped"
    assert third.trip().version == 1
    assert first.trip() is None
    switch(link, targets[1])
    assert (reason(rollout), rollout.status().version) == ("compressed", 2)
    second.record_trip(Trip(2, "why", "now", 1))
    assert reason(rollout) == "tripped"
    switch(link, targets[0])  # an older version: nothing is compressed by what nobody wrote as new
    assert reason(rollout) == "tripped"
    assert rollout.status().unusable
    first.write(lambda old: dataclasses.replace(old, enabled=False))
    assert reason(rollout) == "disabled"
    first.write(lambda old: dataclasses.replace(old, enabled=True))
    assert (reason(rollout), rollout.status().unusable) == ("compressed", False)


def test_an_unusable_file_that_a_link_left_is_forgotten(tmp_path):
    bad, good = tmp_path / "bad.json", tmp_path / "good.json"
    for path in (bad, good):
        Store(path).write(lambda old: policy())
    link = tmp_path / "link.json"
    link.symlink_to(bad)
    rollout = server(link)
    bad.write_text("{")
    rollout.reload()
    assert rollout.status().unusable
    switch(link, good)
    rollout.reload()
    assert not rollout.status().unusable
    switch(link, bad)  # seen before, and known no more
    rollout.reload()
    assert rollout.status().unusable


def test_hard_links_are_warned_of(tmp_path):
    """No way leads from a file to its other names."""
    store = stored(tmp_path)
    assert "warning" not in command("set", "--share", 0.5, "--file", store.path)
    os.link(store.path, tmp_path / "other.json")
    said = command("off", "--file", store.path)
    assert f"warning: {store.path} had 2 names (hard links)" in said
    assert not store.current().enabled


def test_a_file_that_is_mounted_by_itself_is_known(tmp_path):
    mounts = tmp_path / "mountinfo"
    mounts.write_bytes(
        b"63 43 254:0 /a /etc/conf/lagkv-rollout.json rw - ext4 /dev/vda rw\n"
        b"64 43 254:0 /a /with\\040blank\\134.json rw - ext4 /dev/vda rw\n"
        b"65 43 254:0 /a /data rw - ext4 /dev/vda rw\n"
        b"rubbish\n"
    )
    assert mounted_by_itself(Path("/etc/conf/lagkv-rollout.json"), mounts)
    assert mounted_by_itself(Path("/with blank\\.json"), mounts)
    assert not mounted_by_itself(Path("/data/lagkv-rollout.json"), mounts)
    assert not mounted_by_itself(Path("/with"), mounts)
    assert not mounted_by_itself(Path("/data"), tmp_path / "none")
    assert mounted_by_itself(Path("/proc"))  # of the real file


def test_a_server_whose_file_is_mounted_by_itself_says_so(tmp_path, caplog, monkeypatch):
    from lagkv_ext.serving.rollout import watch

    store = stored(tmp_path)
    server(store.path)
    assert "mounted by itself" not in caplog.text
    monkeypatch.setattr(watch, "mounted_by_itself", lambda path: path == store.path)
    server(store.path)
    assert f"{store.path} is mounted by itself" in caplog.text


def test_target_of_what_is_no_link(tmp_path):
    (tmp_path / "folder").mkdir()
    assert target_of(tmp_path / "folder" / ".." / "x.json") == tmp_path / "x.json"


def test_policies_are_equal_by_any_name(tmp_path):
    names = named(tmp_path, ["relative", "absolute"])
    found = [Store(name).current() for name in names]
    assert isinstance(found[0], Policy)
    assert found.count(found[0]) == 3
