"""The plugin's numbers: how they are counted, shared between processes, and served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from lagkv_ext.vllm import metrics
from lagkv_ext.vllm.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
PLAN = Plan(16, 128, 32, 16, 256)
NAMES = ("tokens_seen", "tokens_kept", "partitions", "rows_dropped", "requests_compressed", "requests_full")


@given(
    steps=st.lists(st.integers(1, 700), min_size=1, max_size=8),
    hit=st.integers(0, 40),
    finished=st.booleans(),
)
def test_counts_follow_a_request_whatever_its_chunks(steps, hit, finished):
    fresh, before = metrics.Totals(), metrics.totals
    metrics.totals = fresh
    try:
        counts = metrics.RequestCounts(PLAN)
        counts.seen(SimpleNamespace(request_id="r", is_finished=lambda: finished))
        tokens = cached = hit * 16
        counts.cached("r", cached)
        for step in steps:
            tokens += step
            counts.scheduled("r", tokens)
        partitions = PLAN.m(tokens // PLAN.boundary) - PLAN.m(cached // PLAN.boundary)
        assert fresh.get("tokens_seen") == tokens
        assert fresh.get("tokens_kept") == PLAN.rows(tokens)
        assert fresh.get("partitions") == partitions
        assert fresh.get("rows_dropped") == partitions * 96
        counts.freed("r")
        assert (fresh.get("tokens_seen"), fresh.get("tokens_kept")) == (0, 0)
        kind = "requests_compressed" if PLAN.m(tokens // PLAN.boundary) else "requests_full"
        assert {name: fresh.get(name) for name in NAMES[4:]} == {
            **dict.fromkeys(NAMES[4:], 0),
            kind: finished,
        }
    finally:
        metrics.totals = before


def test_files_of_several_processes_are_added_up(tmp_path):
    (tmp_path / "1.json").write_text(json.dumps({"tokens_seen": 100, "tokens_kept": 40, "requests_full": 2}))
    for rank in (0, 1):
        worker = {"model": "m", "rank": rank, "row_bytes": 10, "seconds": 1.5 + rank}
        (tmp_path / f"{rank + 2}.json").write_text(json.dumps(worker))
    (tmp_path / "4.json").write_text("{half a fi")
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in metrics.Collector(tmp_path).collect()
        for sample in family.samples
    }
    model = ("model", "m")
    assert found["lagkv_vllm_tokens", model, ("state", "kept")] == 40
    assert found["lagkv_vllm_cache_bytes", model, ("state", "uncompressed")] == 2000
    assert found["lagkv_vllm_requests_total", ("cache", "full"), model] == 2
    assert found["lagkv_vllm_compression_seconds_total", model, ("rank", "1")] == 2.5


def test_without_files_there_are_no_metrics(tmp_path, monkeypatch):
    assert list(metrics.Collector(tmp_path).collect()) == []
    monkeypatch.delenv(metrics.FOLDER_VARIABLE, raising=False)
    assert list(metrics.Collector().collect()) == []


def test_a_folder_that_cannot_be_written_costs_only_the_numbers(tmp_path):
    (tmp_path / "file").write_text("")
    totals = metrics.Totals()
    totals.add("seconds", 1.0)
    totals.write(tmp_path / "file" / "folder")
    assert totals.get("seconds") == 1.0


def test_changes_reach_the_file_soon_and_only_where_there_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(tmp_path / "new"))
    totals = metrics.Totals()
    totals.set("model", "m")
    totals.add("seconds", 1.0)
    totals.add("seconds", 0.5)
    assert totals._timer is not None
    totals._timer.join(60)
    assert metrics.read_totals() == [{"model": "m", "seconds": 1.5}]
    monkeypatch.delenv(metrics.FOLDER_VARIABLE)
    silent = metrics.Totals()
    silent.add("seconds", 1.0)
    assert silent._timer is None


PARENT_AND_CHILD = """
import multiprocessing, os, sys
from lagkv_ext.vllm import metrics
def child(queue):
    metrics.share()
    queue.put(os.environ[metrics.FOLDER_VARIABLE])
if __name__ == "__main__":
    metrics.share()
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    process = multiprocessing.get_context("spawn").Process(target=child, args=(queue,))
    process.start()
    print(os.environ[metrics.FOLDER_VARIABLE], queue.get())
    process.join()
"""


def test_workers_share_the_folder_of_their_server_and_another_server_does_not(tmp_path):
    script = tmp_path / "server.py"
    script.write_text(PARENT_AND_CHILD)
    environment = {
        **os.environ,
        metrics.FOLDER_VARIABLE: str(tmp_path / "of another server"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    server, worker = done.stdout.split()[-2:]
    assert server == worker
    assert server != str(tmp_path / "of another server")
