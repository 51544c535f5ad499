"""`benchmarks.vllm_simulation` with vLLM's real scheduler: no block is lost, every request ends, stages overlap."""

from __future__ import annotations

import pytest

from benchmarks.vllm_machines import MACHINES, Batch
from benchmarks.vllm_simulation import Simulation, run
from benchmarks.vllm_traces import MAX_MODEL_LEN, TRACES, Trace
from lagkv_ext.vllm.manager import register_specs


@pytest.mark.parametrize(("trace", "machine", "keep"), [("chat", "8b", 32), ("agents", "70b-pp", 64)])
def test_every_request_ends_and_no_block_is_lost(trace, machine, keep):
    register_specs()
    row = run(machine, trace, keep, 40, 20.0, 2048, 256)
    assert row["requests"] == 40
    assert row["blocks_lost"] == 0
    assert row["tokens"] > 40 * 50
    assert 0 < row["first_token_median"] <= row["first_token_p95"] < row["simulated_seconds"]


def test_two_stages_work_at_the_same_time():
    register_specs()
    simulation = Simulation(MACHINES["70b-pp"], 32, 2000, 256)
    for i in range(2):
        simulation.add(str(i), list(range(2000 * i, 2000 * (i + 1))), 2)
    stage = simulation.machine.seconds(Batch(2000, 2000, 2000 * 1001, 0))
    assert simulation.step() == []  # the second stage has nothing to do
    assert [output.request_id for output in simulation.step()] == ["0"]
    assert simulation.now == pytest.approx(2 * stage, rel=0.01)
    assert len(simulation.step()) == 1
    assert simulation.now == pytest.approx(3 * stage, rel=0.05)


def test_a_pipeline_divides_the_work_of_a_batch():
    tensor, pipeline = MACHINES["70b"], MACHINES["70b-pp"]
    assert tensor.blocks(16) == pipeline.blocks(16)
    one, more = Batch(1, 1000, 1000, 0), Batch(2000, 2000, 2 * 10**6, 0)
    for machine in (tensor, pipeline):
        assert 0 < machine.stage_seconds < machine.seconds(one) < machine.seconds(more)


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_has_the_requests_that_were_asked_for(name):
    trace, sizes = Trace(name, 50, 5.0), []
    while (due := trace.next_time()) is not None:
        arrival, prompt = trace.pop()
        sizes.append(len(prompt) + arrival.turns[0].generated)
        trace.finished(arrival, due + 1, prompt)
    assert len(sizes) == 50
    assert max(sizes) <= MAX_MODEL_LEN
