"""The benchmarks as programs: what they refuse, what they print beside a red check, what their files hold. No times."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks is a package of the checkout, not of the installation

from benchmarks import baselines, cases, fixed_cost, options, report, run, verify  # noqa: E402
from lagkv_ext import reference  # noqa: E402
from lagkv_ext.commands import timing  # noqa: E402
from lagkv_ext.commands.traffic import Problem  # noqa: E402

SMALL = [
    "--tokens",
    "512",
    "--shapes",
    "gemma-3-270m",
    "--dtype",
    "float32",
    "--threads",
    "1",
    "--rounds",
    "2",
]
SMALL += ["--lag-size", "32", "--no-model-cuda"]
QUICK = [*SMALL, "--contenders", "compress_,compress,copy,clone,eager"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("results") / "a.json"
    assert run.main([*QUICK, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def write(path: Path, results: dict) -> str:
    path.write_text(json.dumps(results))
    return str(path)


# -- what is measured and written


def test_the_result_file_holds_every_number_with_its_circumstances(measured):
    assert measured["schema"] == report.SCHEMA
    assert {"processor", "cores", "torch", "cpu_isa", "load_before"} <= set(measured["machine"])
    assert measured["command"].startswith("python -m benchmarks.run")
    (case,) = measured["cases"]
    assert case["problem"]["tokens"] == 512
    assert case["problem"]["dtype"] == "float32"
    assert list(case["contenders"]) == ["compress_", "compress", "copy", "clone", "eager"]
    assert all(check["green"] for check in case["checks"].values())
    for x in case["contenders"].values():
        assert x["seconds"]["count"] == 2
        assert 0 < x["seconds"]["best"] <= x["seconds"]["q1"] <= x["seconds"]["median"] <= x["seconds"]["q3"]
        assert x["gb_per_s"] == pytest.approx(x["least_bytes"] / x["seconds"]["median"] / 1e9)
    assert case["contenders"]["copy"]["copy_share"] == pytest.approx(1)
    assert {"compress_/copy", "compress/clone", "eager/compress", "eager/compress_"} == set(case["ratios"])


def test_every_case_of_a_grid_has_a_name_of_its_own():
    options = run.make_parser().parse_args(
        [
            "--tokens",
            "4k,32k",
            "--dtype",
            "float32,bfloat16",
            "--threads",
            "1",
            "--shapes",
            ",".join(cases.SHAPES),
        ]
    )
    made = run.make_cases(options)
    assert len({case.name for case in made}) == len(made) == 4 * len(cases.SHAPES)


def test_compiled_contenders_pass_the_same_check(monkeypatch):
    # Source that is given to the compiler; every benchmark run checks what the compiler makes of it.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = small_case()
    buffers = baselines.Buffers(case)
    available = baselines.contenders(case)
    for name in ("compiled", "compiled-topk"):
        assert verify.verify(available[name](), buffers) == verify.Check()


def test_kvpress_is_skipped_by_name_with_the_reason(capsys, tmp_path):
    assert run.main([*SMALL, "--contenders", "compress,kvpress", "--kvpress-python", "/nowhere/python"]) == 0
    assert "kvpress skipped: /nowhere/python cannot be started" in capsys.readouterr().out
    without = tmp_path / "python"
    without.write_text("#!/bin/sh\necho 'ModuleNotFoundError: kvpress' >&2; exit 3\n")
    without.chmod(0o755)
    assert run.main([*SMALL, "--contenders", "kvpress", "--kvpress-python", str(without)]) == 0
    shown = capsys.readouterr().out
    assert "kvpress skipped: kvpress's process ended with 3: ModuleNotFoundError: kvpress" in shown


def test_contenders_at_an_instruction_set_run_that_set(monkeypatch):
    case, seen = small_case(), []
    real = torch.ops.lagkv.compress_
    spy = mock.Mock(side_effect=lambda *a, **k: seen.append(torch.ops.lagkv._cpu_isa()) or real(*a, **k))
    spy.default = real.default
    monkeypatch.setattr(torch.ops.lagkv, "compress_", spy)
    before = torch.ops.lagkv._cpu_isa()
    assert verify.verify(baselines.contenders(case)["compress_-portable"](), baselines.Buffers(case)).green
    assert seen == ["portable"]
    assert torch.ops.lagkv._cpu_isa() == before


# -- a number never appears beside a red check


def small_case(**changes) -> cases.Case:
    p = {
        "heads": 2,
        "tokens": 16 + 5 * 32 + 7,
        "key_dim": 16,
        "value_dim": 8,
        "lag_size": 32,
        "keep": 8,
        **changes,
    }
    return cases.Case(cases.SHAPES["llama-3.1-8b"], Problem(**p), "cpu", 1)


def swap_two_kept(result, b):
    key, value, index = (x.clone() for x in result)
    index[:, :, [20, 21]] = index[:, :, [21, 20]]
    return key, value, index


def keep_the_first(result, b):
    """The first keep tokens of every partition, whatever the scores; rows copied right."""
    index = result[2].clone()
    index[:, :, 16:24] = torch.arange(16, 24)
    return reference.compact(b.key, index), reference.compact(b.value, index), index


def wrong_row(result, b):
    key, value, index = (x.clone() for x in result)
    value[0, 1, -1] += 1
    return key, value, index


def wrong_sign_of_zero(result, b):
    key, value, index = (x.clone() for x in result)
    return -key, value, index


def short(result, b):
    return tuple(x[:, :, :-1] for x in result)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (swap_two_kept, "index does not ascend"),
        (keep_the_first, "a token was left out that scores higher"),
        (wrong_row, "value of head 1: 8 of 696"),
        (wrong_sign_of_zero, "key of head 0"),
        (short, "index is torch.int32"),
    ],
)
def test_a_wrong_result_is_red(fault, words):
    case = small_case()
    good = baselines.contenders(case)["compress"]()
    buffers = baselines.Buffers(case)
    assert verify.verify(good, buffers).green
    bad = baselines.Contender("compress", "", lambda b: fault(good.run(b), b), "compress")
    assert words in verify.verify(bad, buffers).difference


def test_a_red_check_prints_the_difference_and_no_time(monkeypatch, capsys, tmp_path):
    def planted(case, **options):
        good = real(case, **options)
        contender = good["compress"]()
        bad = baselines.Contender("compress", "", lambda b: _spoil(contender.run(b)), "compress")
        return {**good, "compress": lambda: bad}

    def _spoil(result):
        key, value, index = result
        return key + 1, value, index

    real = baselines.contenders
    monkeypatch.setattr(baselines, "contenders", planted)
    path = tmp_path / "red.json"
    assert run.main([*QUICK, "--json", str(path)]) == 1
    shown = capsys.readouterr()
    assert "compress RED, not timed: key of head 0" in shown.out
    assert "1 red check" in shown.err
    (case,) = json.loads(path.read_text())["cases"]
    assert "compress" not in case["contenders"]
    assert "compress_" in case["contenders"]
    assert not [name for name in case["ratios"] if "compress" in name.split("/")]


def test_the_check_judges_low_precision_by_its_own_arithmetic():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for score in ("std", "cosine"):
            case = small_case(dtype=dtype, score=score)
            assert (
                verify.verify(baselines.contenders(case)["compress_"](), baselines.Buffers(case))
                == verify.Check()
            )


# -- files against each other


def test_the_guard_sees_a_regression_and_nothing_else(measured, tmp_path, capsys):
    faster = copy.deepcopy(measured)
    for case in faster["cases"]:
        case["ratios"]["compress_/copy"]["median"] /= 1.3
    lines, bad = report.regressions(measured, faster, 0.2)
    assert len(lines) == 2
    assert len(bad) == 1
    assert "compress_/copy" in bad[0]
    assert "+30.0%" in bad[0]
    assert report.regressions(measured, faster, 0.35)[1] == []
    assert report.regressions(faster, measured, 0.2)[1] == []
    # Through the command: nothing is 1000 times slower than itself, and everything is slower than nothing.
    same = write(tmp_path / "same.json", measured)
    assert run.main([*QUICK, "--against", same, "--tolerance", "1000"]) == 0
    for ratio in faster["cases"][0]["ratios"].values():
        ratio["median"] /= 1e6
    assert run.main([*QUICK, "--against", write(tmp_path / "fast.json", faster)]) == 1
    assert "REGRESSION" in capsys.readouterr().err


def test_the_guard_needs_the_numbers_it_guards(measured):
    other = copy.deepcopy(measured)
    other["cases"][0]["name"] = "another"
    with pytest.raises(report.ResultsError, match="no case in common"):
        report.regressions(measured, other, 0.1)
    without = copy.deepcopy(measured)
    del without["cases"][0]["ratios"]["compress_/copy"]
    assert "is not now" in report.regressions(without, measured, 0.1)[1][0]


def test_two_files_are_compared_and_drawn(measured, tmp_path, capsys):
    slower = copy.deepcopy(measured)
    for x in slower["cases"][0]["contenders"].values():
        x["seconds"] = {key: 2 * value for key, value in x["seconds"].items()}
    paths = [write(tmp_path / "a.json", measured), write(tmp_path / "b.json", slower)]
    picture = tmp_path / "picture.png"
    assert run.main(["--compare", *paths, "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert shown.count(" 2.000\n") == 5
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_lengths_are_drawn_as_lines_and_told_per_token(measured, tmp_path):
    longer = copy.deepcopy(measured["cases"][0])
    longer["problem"] = {**longer["problem"], "tokens": 1024, "rows": 300}
    for x in longer["contenders"].values():
        for key in ("median", "q1", "q3", "best"):
            x["seconds"][key] *= 2
    both = {**measured, "cases": [*measured["cases"], longer]}
    report.plot([("", both)], tmp_path / "lines.png")
    assert (tmp_path / "lines.png").stat().st_size > 1000
    lines = report.linearity_lines(both["cases"])
    assert len(lines) == 2
    assert all("dearest/cheapest 1.00" in line for line in lines)


# -- what is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "llama-9"], "unknown shape 'llama-9'; known: llama-3.1-8b"),
        (["--dtype", "int8"], "unknown dtype 'int8'; known: float32, bfloat16, float16, float64"),
        (["--device", "tpu"], "unknown device 'tpu'; known: cpu, cuda"),
        (["--score", "mean"], "unknown score 'mean'; known: std, cosine, blend"),
        (["--contenders", "compress,magic"], "unknown contender 'magic'; known: compress_"),
        (["--threads", "4096"], "--threads must be between 1 and"),
        (["--keep-ratio", "0"], "keep_ratio must be in (0, 1], got 0.0"),
        (["--lag-size", "0", "--keep-ratio", "1"], "lag_size must be at least 1, got 0"),
        (["--tokens", "1m", "--batch", "100000"], "GB are free"),
        (["--against", "/nowhere.json"], "/nowhere.json: No such file"),
        (["--compare", __file__, __file__], "is no JSON"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_measured(arguments, words, capsys):
    assert run.main(arguments) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("tokens", ["0", "4q", "-1", "k"])
def test_a_length_that_is_none_is_refused(tokens, capsys):
    with pytest.raises(SystemExit) as error:
        run.main([f"--tokens={tokens}"])
    assert error.value.code == 2
    assert "a number of tokens is like" in capsys.readouterr().err


@pytest.mark.no_gpu
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu_is_refused(capsys):
    assert run.main(["--device", "cuda"]) == 2
    assert "error: --device cuda: " in capsys.readouterr().err


# -- timing


def test_candidates_take_turns_and_are_restored_every_time():
    events = []
    candidates = [
        timing.Candidate(
            name, lambda n=name: events.append(f"run {n}"), lambda n=name: events.append(f"prepare {n}")
        )
        for name in "abc"
    ]
    measured = timing.measure(candidates, rounds=4, warmup=1, cold=False)
    turns = [tuple(events[i : i + 6]) for i in range(6, len(events), 6)]  # the first six are the warm-up
    assert len(turns) == 4
    for turn in turns:
        assert sorted(turn[0::2]) == ["prepare a", "prepare b", "prepare c"]
        assert [x.replace("prepare", "run") for x in turn[0::2]] == list(turn[1::2])
    assert len(set(turns)) > 1, "the order is never changed"
    assert all(len(measured.rounds[name]) == 4 for name in "abc")


def test_ratios_are_taken_within_rounds():
    measured = timing.Measurement({"a": {0: 2.0, 1: 20.0, 2: 200.0}, "b": {0: 1.0, 1: 10.0}})
    assert measured.ratio("a", "b") == timing.Spread(2.0, 2.0, 2.0, 2.0, 2)
    with pytest.raises(ValueError, match="no values"):
        timing.Measurement({"a": {0: 1.0}, "b": {1: 1.0}}).ratio("a", "b")


def test_a_slow_candidate_stops_when_its_budget_is_spent():
    slow = timing.Candidate("slow", lambda: 5.0, times_itself=True)
    quick = timing.Candidate("quick", lambda: 0.1, times_itself=True)
    measured = timing.measure([slow, quick], rounds=10, cold=False, budget_s=12.0, least_rounds=2)
    assert measured.seconds("slow").count == 3
    assert measured.seconds("quick").count == 10


def test_a_device_is_timed_on_its_own_stream(monkeypatch):
    """Events on the current device's stream would say nothing of work on another device."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            calls.append(stream)

        def synchronize(self):
            calls.append("wait")

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    candidate = timing.Candidate("a", lambda: calls.append("run"))
    measured = timing.measure([candidate], device="cuda:1", rounds=1, warmup=1, cold=False)
    assert calls == ["run", "stream of cuda:1", "run", "stream of cuda:1", "wait"]
    assert measured.seconds("a").median == 2e-3


def test_cold_means_that_more_than_the_cache_is_overwritten(monkeypatch):
    seen = []
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1 << 20)
    flush = timing.cache_flusher(torch.device("cpu"))
    monkeypatch.setattr(timing, "cache_flusher", lambda device: lambda: seen.append("flush") or flush())
    candidate = timing.Candidate("a", lambda: seen.append("run"), lambda: seen.append("prepare"))
    timing.measure([candidate], rounds=1, warmup=1)
    assert seen[-3:] == ["prepare", "flush", "run"]
    assert flush.__closure__[0].cell_contents.numel() == 2 << 20


# -- least bytes


def test_least_bytes_by_hand():
    p = Problem(
        heads=2,
        tokens=4 + 3 * 8 + 5,
        key_dim=3,
        value_dim=1,
        dtype=torch.float32,
        start=4,
        lag_size=8,
        keep=2,
    )
    row = 2 * (3 + 1) * 4  # both heads, key and value
    assert (p.partitions, p.compressed, p.rows) == (3, 2, 4 + 2 * 2 + 8 + 5)
    assert p.least_bytes("copy") == 2 * 33 * row
    assert p.least_bytes("compress") == (33 + 21) * row + 2 * 21 * 4
    assert p.least_bytes("compress_") == (29 + 17) * row + 2 * 21 * 4
    assert p.least_bytes("compress_varlen") == (33 + 21) * row + 2 * 33 * 4
    assert p.least_bytes("compress_ragged_") == (29 + 17) * row + 2 * 33 * 4
    assert p.least_bytes("compress_paged_") == p.least_bytes("compress_ragged_")
    assert p.least_bytes("partition_bounds") == 24 * row + 3 * 2 * row
    assert p.least_bytes("lag_score") == 24 * row + 2 * 2 * 8 * 4
    assert p.least_bytes("topk_index") == 2 * 2 * 8 * 4 + 2 * 2 * 2 * 4
    assert p.least_bytes("compact") == 2 * 21 * row + 2 * 2 * 21 * 4
    with pytest.raises(ValueError, match="unknown operator 'sort'"):
        p.least_bytes("sort")


# -- the fixed cost


def test_the_line_through_points_that_lie_on_one():
    line = fixed_cost.fit({1: 9.0, 2: 11.0, 8: 23.0})
    assert (line.fixed, line.slope, line.residual) == pytest.approx((7.0, 2.0, 0.0), abs=1e-9)
    with pytest.raises(ValueError, match="two points"):
        fixed_cost.fit({1: 9.0})


def test_a_fit_that_is_no_line_does_not_meet_the_target():
    def result(medians):
        points = {str(n): {"median": y} for n, y in medians.items()}
        line = fixed_cost.fit(medians)
        return {"us_per_call": points, "fit_of_medians": {"fixed": line.fixed, "residual": line.residual}}

    assert fixed_cost.verdict(result({1: 9.0, 2: 11.0, 8: 23.0})) == "7.0 us; met"
    assert fixed_cost.verdict(result({1: 22.0, 2: 24.0, 8: 36.0})) == "20.0 us; MISSED"
    assert "not judged" in fixed_cost.verdict(result({1: 20.0, 2: 90.0, 8: 100.0}))


def test_the_fixed_cost_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(fixed_cost, "HEADS", (1, 2))
    path = tmp_path / "fixed.json"
    assert fixed_cost.main(["--layers", "2", "--rounds", "2", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert set(result["fixed_cost"]) == {"operator", "function", "copy"}
    assert result["decode"]["layers"] == 2
    assert "fixed cost of a call, target at most 15 us" in capsys.readouterr().out
    assert fixed_cost.main(["--partitions", "1"]) == 2
    assert "--partitions must be at least 2" in capsys.readouterr().err


# -- the cache, end to end


@pytest.fixture(scope="module")
def cache_benchmark():
    pytest.importorskip("transformers", reason="benchmarks of the cache need transformers")
    from benchmarks import cache

    return cache


def test_rows_follow_the_recursion(cache_benchmark):
    assert cache_benchmark.rows_after([100, 200], None) == 300
    # 16 + 2 * 128 tokens are two partitions, of which one is compressed; then every 128 tokens one more
    assert cache_benchmark.rows_after([271], 0.25) == 271
    assert cache_benchmark.rows_after([272], 0.25) == 16 + 32 + 128
    assert cache_benchmark.rows_after([272, 127], 0.25) == 16 + 32 + 128 + 127
    assert cache_benchmark.rows_after([272, 128], 0.25) == 16 + 2 * 32 + 128


def test_append_and_decode_are_checked_and_told(cache_benchmark, capsys, tmp_path):
    path = tmp_path / "append.json"
    quick = ["--tokens", "400", "--keep-ratio", "0.25", "--rounds", "1", "--threads", "1", "--layers", "1"]
    assert cache_benchmark.main(["append", *quick, "--json", str(path)]) == 0
    (result,) = json.loads(path.read_text())["results"]
    assert result["checks"] == {"LagKVCache 1": True, "DynamicCache": True, "LagKVCache 0.25": True}
    assert result["caches"]["LagKVCache 0.25"]["rows"] < result["caches"]["DynamicCache"]["rows"]
    assert cache_benchmark.main(["decode", *quick]) == 0
    assert "tokens/s" in capsys.readouterr().out


def test_a_cache_that_loses_a_row_is_red_and_has_no_time(cache_benchmark, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        cache_benchmark, "held_rows", lambda cache, layer: cache.layers[layer].keys.shape[2] - 1
    )
    path = tmp_path / "append.json"
    quick = [
        "--tokens",
        "300",
        "--keep-ratio",
        "0.25",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--json",
        str(path),
    ]
    assert cache_benchmark.main(["append", *quick]) == 1
    assert "LagKVCache 0.25 RED, not shown" in capsys.readouterr().out
    assert json.loads(path.read_text())["results"][0]["caches"] == {}


def test_a_model_that_says_something_else_is_red(cache_benchmark, capsys, monkeypatch):
    monkeypatch.setattr(
        cache_benchmark,
        "make_cache",
        lambda config, ratio, real=cache_benchmark.make_cache: real(config, 0.25 if ratio == 1.0 else ratio),
    )
    assert cache_benchmark.main(["decode", "--tokens", "300", "--rounds", "1", "--layers", "1"]) == 2
    assert "RED, not timed: with keep_ratio=1 the logits differ" in capsys.readouterr().err


def test_the_cache_benchmark_refuses(cache_benchmark, capsys):
    assert cache_benchmark.main(["append", "--dtype", "int8"]) == 2
    assert "unknown dtype 'int8'" in capsys.readouterr().err
    assert cache_benchmark.main(["append", "--tokens", "9000m"]) == 2
    assert "GB for caches" in capsys.readouterr().err
    assert cache_benchmark.main(["decode", "--model", "/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err


def test_the_options_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(
        options, "OPTIONS", {name: options.OPTIONS[name] for name in ("std", "blend smooth 3 head")}
    )
    path = tmp_path / "options.json"
    small = ["--tokens", "600", "--heads", "1", "--rounds", "1", "--dtype", "float32"]
    assert options.main([*small, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for call in ("in place", "into new tensors", "a step of the recursion"):
        assert f"{call}: milliseconds and ratio to std" in printed
        assert set(json.loads(path.read_text())[call]) == {"std", "blend smooth 3 head"}
    assert options.main(["--tokens", "0"]) == 2
    monkeypatch.setattr(options, "same_choice", lambda choice, device: 0.5)
    assert options.main(small) == 1
    assert "keeps 50.0% of the reference's rows" in capsys.readouterr().err
