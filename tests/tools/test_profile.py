"""``lagkv profile``: stages, labels in torch.profiler's traces, CUDA launches read from a trace, refusals. No times."""

from __future__ import annotations

import dataclasses
import gc
import gzip
import json
import shlex

import pytest
import torch
from torch.profiler import ProfilerActivity
from torch.utils._pytree import tree_leaves

import lagkv_ext
from lagkv_ext.commands import profile as profiling
from lagkv_ext.commands.stages import make_calls, needed_bytes
from lagkv_ext.commands.traffic import Problem

SMALL = Problem(heads=2, tokens=16 + 4 * 32 + 5, key_dim=16, value_dim=8, lag_size=32, keep=8)
ARGUMENTS = [
    "--heads",
    "2",
    "--tokens",
    "149",
    "--dim",
    "16",
    "--value-dim",
    "8",
    "--lag-size",
    "32",
    "--keep",
    "8",
]
ARGUMENTS += ["--dtype", "float32", "--rounds", "2", "--cache", "warm"]
STAGES = ("bounds", "score", "select", "compact", "compress", "compress_", "copy")
RAGGED = ("compress_ragged_", "compress_varlen", "compress_paged_")
OPERATORS = ("compress", "compress_", "partition_bounds", "lag_score", "topk_index", "compact")


def labels(path) -> list[str]:
    """Names of the operator events in a Chrome trace."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [event["name"] for event in json.loads(text)["traceEvents"] if event.get("cat") == "cpu_op"]


# -- labels


def test_torch_profiler_names_every_operator_with_its_shapes():
    key, value = torch.randn(1, 2, 160, 8), torch.randn(1, 2, 160, 8)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        kept = lagkv_ext.compress(key, value, lag_size=32, keep=8)
        lagkv_ext.partition_bounds(key, lag_size=32)
        lagkv_ext.topk_index(lagkv_ext.lag_score(key, value, lag_size=32), 8)
        lagkv_ext.compact(key, kept.index)
        lagkv_ext.compress_(key, value, lag_size=32, keep=8)
    events = {event.key: event for event in profiler.key_averages(group_by_input_shape=True)}
    for name in OPERATORS:
        assert events[f"lagkv::{name}"].count == 1
    assert events["lagkv::compress"].input_shapes[:2] == [[1, 2, 160, 8], [1, 2, 160, 8]]


def test_a_trace_file_holds_every_operator_three_times(tmp_path):
    for name in ("trace.json", "trace.json.gz"):
        profiling.write_trace(SMALL, tmp_path / name)
        found = labels(tmp_path / name)
        for operator, calls in zip(OPERATORS, (3, 3, 6, 3, 3, 6), strict=True):
            assert found.count(f"lagkv::{operator}") == calls
    stages = [e["name"] for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert stages.count("lagkv profile: bounds") == 3


# -- what is told


def test_every_stage_is_measured_and_told():
    result = profiling.profile(SMALL, rounds=2, cold=False, threads=1)
    assert [stage.name for stage in result.stages] == list(STAGES)
    told = result.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told["problem"]["rows"] == SMALL.rows
    for stage in result.stages:
        assert stage.gb_per_s == pytest.approx(stage.least_bytes / stage.seconds.median / 1e9)
    assert result.stages[-1].copy_share == pytest.approx(1)
    text = str(result)
    assert "4 partitions, 149 -> 77 rows" in text
    assert all(f"\n{name} " in text for name in STAGES)
    assert "launch plan, registers, occupancy: only on CUDA" in text
    assert result.facts["threads"] == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_ragged_stages_keep_what_compress_keeps(batch):
    """Every stage does the same work on the same rows: same kept positions, run after run."""
    problem = dataclasses.replace(SMALL, batch=batch)
    calls = {call.name: call for call in make_calls(problem, torch.device("cpu"), 0, ragged=True)}
    assert tuple(calls) == (*STAGES[:-1], *RAGGED, "copy")
    expected = calls["compress"].run()[2]
    for name in ("compress_", *RAGGED):
        for _ in range(2):
            calls[name].restore()
            result = calls[name].run()
            index = result[2] if isinstance(result, (tuple, list)) else result
            if name == "compress_varlen":  # [H, T]
                index = index[:, : batch * problem.rows].unflatten(1, (batch, problem.rows)).transpose(0, 1)
            assert torch.equal(index[..., : problem.rows], expected), name


def test_ragged_stages_are_measured_and_told():
    result = profiling.profile(SMALL, rounds=2, cold=False, threads=1, ragged=True)
    assert [stage.name for stage in result.stages] == [*STAGES[:-1], *RAGGED, "copy"]
    assert all(f"\n{name} " in str(result) for name in RAGGED)


def test_the_memory_that_is_asked_for_is_what_the_calls_take():
    """Bytes that the calls hold, and the largest result."""

    def storages() -> dict[int, int]:
        found = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor]
        return {storage.data_ptr(): storage.nbytes() for storage in found}

    problem = dataclasses.replace(SMALL, tokens=16 + 40 * 32, key_dim=64, value_dim=64)
    for ragged in (False, True):
        gc.collect()
        before = storages()
        calls = make_calls(problem, torch.device("cpu"), 0, ragged=ragged)
        held = sum(size for address, size in storages().items() if address not in before)
        results = [tree_leaves(call.run()) for call in calls if call.name != "copy"]
        largest = max(sum(x.nbytes for x in tensors) for tensors in results)
        assert held + largest <= 1.1 * needed_bytes(problem, ragged=ragged) <= 1.5 * (held + largest)
        del calls, results


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    profiling.profile(SMALL, rounds=1, cold=False, threads=1)
    assert torch.get_num_threads() == before


def test_the_command_writes_its_files_and_the_nsight_command_makes_the_same_problem(tmp_path, capsys):
    files = {name: tmp_path / name for name in ("trace.json", "result.json")}
    written = ["--trace", str(files["trace.json"]), "--json", str(files["result.json"])]
    assert profiling.main([*ARGUMENTS, *written]) == 0
    shown = capsys.readouterr().out
    assert "lagkv::compress" in labels(files["trace.json"])
    assert len(json.loads(files["result.json"].read_text())["stages"]) == len(STAGES)
    command = shlex.split(shown.strip().splitlines()[-1].split(": ", 1)[1])
    assert command[0] == "ncu"
    rest = command[command.index("lagkv_ext.commands.profile") + 1 :]
    assert rest[:3] == ["--once", "--device", "cuda"]
    again = profiling._parser("").parse_args(rest)
    assert (again.heads, again.tokens, again.dim, again.value_dim) == (2, 149, 16, 8)
    assert (again.lag_size, again.keep, again.dtype, again.sink_size) == (32, 8, "float32", 16)


def test_the_command_lagkv_passes_its_options_on(capsys):
    typer_testing = pytest.importorskip("typer.testing", reason="the command lagkv needs typer")
    from lagkv_ext.commands import cli

    runner = typer_testing.CliRunner()
    result = runner.invoke(cli.app, ["profile", *ARGUMENTS])
    assert result.exit_code == 0
    assert "4 partitions, 149 -> 77 rows" in result.stdout
    assert runner.invoke(cli.app, ["profile", "--dtype", "int8"]).exit_code == 2
    assert "usage: lagkv profile" in runner.invoke(cli.app, ["profile", "--help"]).stdout


def test_once_runs_every_stage_and_times_none(capsys):
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        assert profiling.main([*ARGUMENTS, "--once"]) == 0
    assert capsys.readouterr().out == ""
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["lagkv::compress_"] == 2  # the warm-up and the one
    assert "lagkv::compress_paged_" not in counts


def test_ragged_stages_go_into_the_trace_and_into_the_nsight_command(tmp_path, capsys):
    trace = tmp_path / "trace.json"
    assert profiling.main([*ARGUMENTS, "--ragged", "--trace", str(trace)]) == 0
    assert [labels(trace).count(f"lagkv::{name}") for name in RAGGED] == [3, 3, 3]
    command = shlex.split(capsys.readouterr().out.strip().splitlines()[-1].split(": ", 1)[1])
    assert command[-1] == "--ragged"


# -- CUDA, as torch.profiler writes it


def test_launches_are_read_from_a_trace():
    def event(name, ts, **args):
        base = {"grid": [264, 1, 1], "block": [256, 1, 1], "registers per thread": 64, "shared memory": 9216}
        return {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": 12.5, "args": {**base, **args}}

    trace = {
        "traceEvents": [
            {"ph": "X", "cat": "cpu_op", "name": "lagkv::compress", "ts": 1, "dur": 2},
            event("void lagkv::cuda::move_rows<16>(lagkv::cuda::MoveArgs)", 20),
            event(
                "void lagkv::cuda::compress<lagkv::cuda::Row<float, 4>, (lagkv::Score)0>(lagkv::Params<float>)",
                10,
                **{"est. achieved occupancy %": 48},
            ),
        ]
    }
    first, second = profiling.kernels_of_trace(trace, "compress_")
    assert first.name == "lagkv::cuda::compress<lagkv::cuda::Row<float, 4>, (lagkv::Score)0>"
    assert (first.grid, first.block, first.registers) == ((264, 1, 1), (256, 1, 1), 64)
    assert (first.shared_bytes, first.occupancy_percent, first.microseconds) == (9216, 48, 12.5)
    assert second.name == "lagkv::cuda::move_rows<16>"
    assert second.occupancy_percent is None


@pytest.mark.gpu
def test_a_gpu_shows_its_launches():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    result = profiling.profile(SMALL, device="cuda", rounds=2)
    assert {kernel.stage for kernel in result.kernels} >= {"bounds", "score", "select", "compact", "compress"}
    assert all(0 < kernel.registers <= 255 for kernel in result.kernels)


# -- what is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "int8"], "unknown dtype 'int8'; known: float16, bfloat16, float32, float64"),
        (["--device", "tpu"], "unknown device 'tpu'; known: cpu, cuda, cuda:INDEX"),
        (["--device", "cuda:x"], "unknown device 'cuda:x'"),
        (["--score", "mean"], "score must be one of std, cosine, blend; got 'mean'"),
        (["--keep", "0"], "keep must be at least 1, got 0"),
        (["--keep", "200"], "keep must be at most lag_size (128), got 200"),
        (["--keep-ratio", "1.5"], "keep_ratio must be in (0, 1], got 1.5"),
        (["--tokens", "0"], "tokens must be at least 1, got 0"),
        (["--threads", "4096"], "threads must be between 1 and"),
        (["--tokens", "2000000000", "--heads", "64"], "GB are free"),
        (["--rounds", "0", "--tokens", "512"], "rounds must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words, capsys):
    assert profiling.main(arguments) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.out == ""


@pytest.mark.no_gpu
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_said(capsys):
    assert profiling.main(["--device", "cuda"]) == 2
    assert "error: device cuda: torch " in capsys.readouterr().err
