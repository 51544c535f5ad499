"""``make gpu-check`` has minutes on a machine that nobody has seen: order, time limits, kills and what is missing.

The rehearsal runs the same steps with the CPU in the card's place.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
if not (ROOT / "tools" / "gpu_check").exists():
    pytest.skip("no tools here: tests run outside a checkout", allow_module_level=True)
sys.path.insert(0, str(ROOT))  # tools and benchmarks are packages of the checkout, not of the installation

from benchmarks import card, card_tables  # noqa: E402
from tools.gpu_check import counters, plan, steps  # noqa: E402
from tools.gpu_check.log import HEAD, TAIL, Log  # noqa: E402
from tools.gpu_check.record import Record  # noqa: E402
from tools.gpu_check.steps import Step  # noqa: E402

# Imported by tests and by what they test; torch does not bring them.
OPTIONAL = (
    "accelerate",
    "gguf",
    "kvpress",
    "matplotlib",
    "numpy",
    "prometheus_client",
    "rich",
    "safetensors",
    "tokenizers",
    "transformers",
    "typer",
    "yaml",
)


def shell(name: str, script: str, share: float = 1.0, **options) -> Step:
    return Step(name, ("/bin/sh", "-c", script), share, **{"least_s": 0.0, **options})


class Ran:
    """Files in the folder after some steps."""

    def __init__(self, folder: Path, todo: list[Step], seconds: float) -> None:
        log = Log(folder / "log.txt")
        self.good = steps.run_all(todo, seconds, Record(folder, {"card": "none"}, seconds / 60), log)
        self.content = json.loads((folder / "record.json").read_text())
        self.report = (folder / "report.txt").read_text()
        self.log = (folder / "log.txt").read_text()

    @property
    def verdicts(self) -> dict[str, str]:
        return {step["name"]: step["verdict"] for step in self.content["steps"]}


def test_a_failing_step_does_not_stop_the_others(tmp_path):
    todo = [
        shell("first", "echo one"),
        shell("second", "echo two; exit 3"),
        Step("third", ("/no/such/program",), 1.0, least_s=0.0),
        shell("fourth", "echo four >> log-of-fourth; rm log-of-fourth"),
    ]
    ran = Ran(tmp_path, todo, 60)
    assert ran.verdicts == {"first": "passed", "second": "FAILED", "third": "FAILED", "fourth": "passed"}
    assert not ran.good
    assert ran.content["steps"][1]["exit_status"] == 3
    assert ran.content["steps"][1]["tail"] == ["two"]
    assert "No such file" in ran.content["steps"][2]["reason"]
    assert ran.content["running"] is None
    assert ran.log.index("one") < ran.log.index("two")
    assert "--- second failed: exit status 3" in ran.report


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=8), st.floats(1, 3600))
def test_steps_that_use_all_of_their_time_end_with_the_time(shares, seconds):
    left = seconds
    for i in range(len(shares)):
        limit = steps.limit_s(left, shares[i:])
        assert limit == pytest.approx(seconds * shares[i] / sum(shares))
        left -= limit
    assert left == pytest.approx(0, abs=1e-6 * seconds)


def test_time_that_is_not_used_goes_to_the_later_steps(tmp_path):
    ran = Ran(tmp_path, [shell("quick", "true", share=9), shell("late", "true", share=1)], 100)
    first, second = ran.content["steps"]
    assert first["limit_s"] == pytest.approx(90, abs=1)
    assert second["limit_s"] > 90
    assert ran.good


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_step_ends_at_its_limit_with_all_its_processes(tmp_path, monkeypatch):
    """One that ignores the first signal, and has started another."""
    monkeypatch.setattr(steps, "GRACE_S", 0.3)
    hangs = "trap '' TERM; sleep 1000 & echo child $!; echo measured; wait; sleep 1000"
    ran = Ran(tmp_path, [shell("hangs", hangs, share=1), shell("next", "echo here", share=2)], 6)
    assert ran.verdicts == {"hangs": "stopped", "next": "passed"}
    assert not ran.good
    step = ran.content["steps"][0]
    assert step["seconds"] <= step["limit_s"] + 2
    assert "measured" in step["tail"]
    child = int(re.search(r"child (\d+)", ran.log)[1])
    assert not alive(child)


def test_what_takes_all_the_time_there_is_has_done_its_work_when_it_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "GRACE_S", 0.3)
    assert Ran(tmp_path, [shell("to the end", "sleep 1000", until_the_end=True)], 1.5).good


def test_what_did_not_fit_and_what_is_missing_is_listed(tmp_path):
    todo = [
        shell("here", "true"),
        shell("too long", "echo must not run", least_s=1000),
        shell("no tool", "echo must not run", absent="ncu is not on the PATH"),
        shell("last", "true"),
    ]
    ran = Ran(tmp_path, todo, 30)
    assert ran.verdicts == {"here": "passed", "last": "passed"}
    assert set(ran.content["not_run"]) == {"too long", "no tool"}
    assert "needs 1000 s at least" in ran.content["not_run"]["too long"]
    assert "no tool: ncu is not on the PATH" in ran.report
    assert "must not run" not in ran.log
    assert not ran.good


def test_a_machine_that_refuses_a_tool_is_told_from_a_failure(tmp_path):
    todo = [
        shell("refused", "echo 'Error: Device not supported'; exit 1", refusal=plan.SANITIZER_REFUSAL),
        shell("faulty", "echo '========= ERROR SUMMARY: 2 errors'; exit 0", fault=plan.SANITIZER_FAULT),
        shell("clean", "echo '========= ERROR SUMMARY: 0 errors'; exit 0", fault=plan.SANITIZER_FAULT),
        shell("broken", "echo 'Device not supported' >&2; echo '========= Invalid __global__ read'; exit 1",
              refusal=plan.SANITIZER_REFUSAL, fault=plan.SANITIZER_FAULT),
    ]  # fmt: skip
    ran = Ran(tmp_path, todo, 60)
    assert ran.verdicts == {"refused": "not run", "faulty": "FAILED", "clean": "passed", "broken": "FAILED"}
    assert ran.content["not_run"] == {"refused": "Error: Device not supported"}
    assert not ran.good


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_in_the_middle_loses_nothing(tmp_path, number):
    """The whole run is killed: what ran, what was running and what was not reached are in the files."""
    code = f"""
        import sys
        from pathlib import Path
        from tools.gpu_check import steps
        from tools.gpu_check.log import Log
        from tools.gpu_check.record import Record

        steps.end_on_sigterm()
        folder = Path({str(tmp_path)!r})
        scripts = {{"done": "echo one", "cut off": "echo pid $$; echo half; exec sleep 1000", "late": ""}}
        todo = [
            steps.Step(name, ("/bin/sh", "-c", script), 1.0, least_s=0.0) for name, script in scripts.items()
        ]
        steps.run_all(todo, 600, Record(folder, {{"card": "none"}}, 10), Log(folder / "log.txt"))
        """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        log = tmp_path / "log.txt"
        deadline = time.monotonic() + 60
        while not (log.exists() and "\nhalf\n" in log.read_text()):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(number)
        process.wait()
    running = int(re.search(r"^pid (\d+)$", log.read_text(), re.MULTILINE)[1])
    if number == signal.SIGKILL:  # which leaves no time to end it
        os.kill(running, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while alive(running):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    content = json.loads((tmp_path / "record.json").read_text())
    assert [step["name"] for step in content["steps"]] == ["done"]
    assert content["running"]["name"] == "cut off"
    assert content["not_run"] == {"late": "not reached"}
    assert "one" in log.read_text()
    report = (tmp_path / "report.txt").read_text()
    assert "running" in report
    assert "late: not reached" in report


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["the process starts", "its reader starts"])
def test_a_signal_while_a_step_starts_ends_the_step_too(tmp_path, monkeypatch, number, moment):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)
            if moment == "the process starts":
                signal.raise_signal(number)

    class Thread(threading.Thread):
        def start(self):
            super().start()
            if moment == "its reader starts":
                signal.raise_signal(number)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(threading, "Thread", Thread)
    before = signal.getsignal(signal.SIGTERM)
    try:
        steps.end_on_sigterm()
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            Ran(tmp_path, [shell("long", "exec sleep 1000")], 600)
    finally:
        signal.signal(signal.SIGTERM, before)
    (process,) = started
    assert process.poll() is not None


def test_the_log_is_bounded_and_keeps_beginning_and_end(tmp_path):
    chatty = (
        "echo first line; i=0; while [ $i -lt 40000 ]; do echo some words to fill a line $i; i=$((i+1)); done"
    )
    ran = Ran(
        tmp_path, [shell("before", "echo before"), shell("chatty", chatty), shell("after", "echo after")], 60
    )
    assert ran.verdicts["chatty"] == "passed"
    assert len(ran.log) < HEAD + TAIL + 1000
    for text in ("before", "first line", "bytes left out", "fill a line 39999", "after"):
        assert text in ran.log, text
    assert ran.content["steps"][1]["tail"][-1].endswith("39999")


TESTS = """
import time

def test_right():
    pass

def test_wrong():
    assert {wrong} == 1, "wrong on purpose"

def test_never_ends():
    time.sleep(1000)
"""


@pytest.mark.parametrize("wrong", [1, 2])
def test_tests_of_a_run_that_was_stopped_are_counted(tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(steps, "GRACE_S", 0.3)
    (tmp_path / "test_some.py").write_text(TESTS.format(wrong=wrong))
    path = tmp_path / "tests.jsonl"
    command = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tools.gpu_check.progress",
        "--rootdir",
        str(tmp_path),
    )
    step = Step(
        "tests",
        (*command, "-c", os.devnull, str(tmp_path / "test_some.py")),
        1.0,
        environment={"LAGKV_PROGRESS": str(path)},
        tests=path,
        until_the_end=True,
    )
    # Stopped once both results are there, however slow the machine.
    wait = subprocess.Popen.wait

    def until_written(self, timeout=None):
        deadline = time.monotonic() + 60
        while not (path.exists() and path.read_text().count("\n") >= 2):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", until_written)
    ran = Ran(tmp_path, [step], 100)
    (told,) = ran.content["steps"]
    counts = {name: told["tests"][name] for name in ("passed", "failed", "skipped")}
    assert counts == {"passed": 2 if wrong == 1 else 1, "failed": 0 if wrong == 1 else 1, "skipped": 0}
    assert told["verdict"] == ("stopped" if wrong == 1 else "FAILED")
    assert ran.good == (wrong == 1)
    if wrong == 2:
        assert "wrong on purpose" in told["tests"]["failures"][0]["message"]
        assert "test_wrong" in ran.report
    assert not path.exists()


# -- the plan


def machine(tmp_path: Path, **changes) -> plan.Machine:
    known = {
        "capability": "9.0",
        "folder": tmp_path,
        "cores": 16,
        "sanitizer": "/bin/sanitizer",
        "ncu": "/bin/ncu",
    }
    return plan.Machine(**{**known, "xdist": True, **changes})


ORDER = [
    "build",
    "examples",
    "benchmarks",
    "counters",
    "memcheck",
    "racecheck",
    "properties",
]


def test_steps_come_in_order_of_worth_with_missing_tools_named(tmp_path):
    made = plan.steps(machine(tmp_path))
    assert [step.name for step in made] == ORDER
    assert not any(step.absent for step in made)
    without = {step.name: step.absent for step in plan.steps(machine(tmp_path, sanitizer=None, ncu=None))}
    assert {name for name, absent in without.items() if absent} == {"counters", "memcheck", "racecheck"}
    assert "ncu" in without["counters"]
    assert "compute-sanitizer" in without["memcheck"]


def test_only_the_last_step_may_be_stopped_without_fault(tmp_path):
    made = plan.steps(machine(tmp_path))
    assert [step.name for step in made if step.until_the_end] == ["properties"]


def test_nine_minutes_are_enough_for_every_step_even_where_all_use_their_whole_share(tmp_path):
    made = plan.steps(machine(tmp_path))
    left = 9 * 60 - 25.0  # torch takes its time to name the card
    for i, step in enumerate(made):
        limit = steps.limit_s(left, [later.share for later in made[i:]])
        assert limit >= step.least_s, step.name
        left -= limit


def test_where_nothing_fits_every_step_is_listed(tmp_path):
    made = plan.steps(machine(tmp_path))
    ran = Ran(tmp_path, made, 5)
    assert ran.verdicts == {}
    assert list(ran.content["not_run"]) == ORDER
    assert not ran.good


def test_builds_for_the_card_alone_with_every_core(tmp_path):
    build = plan.steps(machine(tmp_path, capability="10.0"))[0]
    assert build.environment == {"TORCH_CUDA_ARCH_LIST": "10.0", "LAGKV_BUILD_CUDA": "1", "MAX_JOBS": "16"}


def test_no_step_passes_by_skipping_its_tests(tmp_path):
    made = plan.steps(machine(tmp_path))
    commands = {step.name: " ".join(step.command) for step in made if "-m pytest" in " ".join(step.command)}
    assert set(commands) == {"examples", "memcheck", "racecheck", "properties"}
    for name, command in commands.items():
        assert command.count("--require-backend cuda") == command.count("-m pytest"), name


def test_xdist_is_used_where_it_is_there(tmp_path):
    for xdist in (False, True):
        made = plan.steps(machine(tmp_path, xdist=xdist))
        assert all((" -n 12 " in step.command[-1]) == xdist for step in made if step.until_the_end)


def test_selected_tests_exist():
    for selected in (plan.EXAMPLES, *plan.FIRST_ON_CARD):
        path, _, name = selected.partition("::")
        assert f"def {name}" in (ROOT / path).read_text()


def test_everything_is_imported_without_the_optional_packages():
    """pytest runs no test at all where one file cannot be imported: the tests that need a card included."""
    code = f"""
        import sys
        from importlib.machinery import PathFinder

        class WithoutOptional(PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                if name.split(".")[0] in {OPTIONAL!r}:
                    return None
                return super().find_spec(name, path, target)

        sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutOptional
        import benchmarks.card, lagkv_ext.commands.profile, tools.gpu_check.counters
        import pytest
        sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]))
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "test_gpu.py::test_launches_on_the_current_stream" in done.stdout


# -- counters


NCU = """\
==PROF== Connected to process 77 (/usr/bin/python3.12)
==PROF== Profiling "compress_kernel": 0%....50%....100% - 3 passes
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","77","python3.12","127.0.0.1","void lagkv::cuda::compress_kernel<lagkv::cuda::Row<float, 4, 32, 1>, (lagkv::Score)0>(lagkv::CompressParams)","1","7","(256, 1, 1)","(264, 1, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","ns","41,088"
"0","77","python3.12","127.0.0.1","void lagkv::cuda::compress_kernel<lagkv::cuda::Row<float, 4, 32, 1>, (lagkv::Score)0>(lagkv::CompressParams)","1","7","(256, 1, 1)","(264, 1, 1)","0","9.0","Command line profiler metrics","dram__bytes_read.sum","byte","134,217,728"
"0","77","python3.12","127.0.0.1","void lagkv::cuda::compress_kernel<lagkv::cuda::Row<float, 4, 32, 1>, (lagkv::Score)0>(lagkv::CompressParams)","1","7","(256, 1, 1)","(264, 1, 1)","0","9.0","Command line profiler metrics","smsp__issue_active.avg.pct_of_peak_sustained_active","%","71.31"
"0","77","python3.12","127.0.0.1","void lagkv::cuda::compress_kernel<lagkv::cuda::Row<float, 4, 32, 1>, (lagkv::Score)0>(lagkv::CompressParams)","1","7","(256, 1, 1)","(264, 1, 1)","0","9.0","Command line profiler metrics","dram__bytes_write.sum","","n/a"
"1","77","python3.12","127.0.0.1","lagkv::cuda::topk_kernel(lagkv::TopkParams)","1","7","(256, 1, 1)","(264, 1, 1)","0","9.0","Command line profiler metrics","launch__registers_per_thread","register/thread","64"
"""  # noqa: E501


def test_the_profilers_table_is_read():
    first, second = counters.parse(NCU.splitlines())
    assert first == {
        "kernel": "compress_kernel<Row<float, 4, 32, 1>, (Score)0>",
        "nanoseconds": 41088,
        "dram_bytes_read": 134217728,
        "issue_slots_percent": 71.31,
        "dram_bytes_written": None,
    }
    assert second == {"kernel": "topk_kernel", "registers": 64}
    assert counters.parse(["==ERROR== The user does not have permission (ERR_NVGPUCTRPERM)"]) == []


# -- the rehearsal

# Stands for ncu: runs what it is given, and writes a table where it is told to.
NCU_SCRIPT = """\
#!/bin/sh
while [ "$1" != "--log-file" ]; do shift; done
cat > "$2" <<'TABLE'
{table}TABLE
while [ "$1" != {python} ]; do shift; done
exec "$@"
"""
# Stands for compute-sanitizer: runs what it is given.
SANITIZER_SCRIPT = """\
#!/bin/sh
while [ "$1" != {python} ]; do shift; done
"$@" || exit 9
echo "========= ERROR SUMMARY: 0 errors"
"""


def rehearse(tmp_path: Path) -> tuple[int, Path]:
    """Exit status and folder of the results."""
    tools = tmp_path / "tools"
    tools.mkdir()
    python = f"'{sys.executable}'"
    for name, script in (("ncu", NCU_SCRIPT), ("compute-sanitizer", SANITIZER_SCRIPT)):
        path = tools / name
        path.write_text(script.replace("{table}", NCU).replace("{python}", python))
        path.chmod(0o755)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tools.gpu_check",
            "--rehearse",
            "--minutes",
            "20",
            "--results",
            str(tmp_path),
        ],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    return done.returncode, tmp_path / "rehearsal"


def test_the_rehearsal(tmp_path):
    """One test, so that workers do not rehearse once each."""
    status, folder = rehearse(tmp_path)
    check_steps(status, folder)
    check_files(folder)
    check_measurements(folder)
    check_tables(folder, tmp_path)
    check_tables_of_a_run_that_was_cut_off(folder, tmp_path)


def check_steps(status: int, folder: Path) -> None:
    content = json.loads((folder / "record.json").read_text())
    told = {step["name"]: step["verdict"] for step in content["steps"]}
    assert told == dict.fromkeys(ORDER, "passed"), (folder / "report.txt").read_text()
    assert list(told) == ORDER
    assert content["not_run"] == {}
    assert status == 0
    counts = {step["name"]: step["tests"]["passed"] for step in content["steps"] if step["tests"]}
    assert counts["examples"] > counts["memcheck"] == counts["racecheck"] > 20
    assert counts["properties"] == 2  # one test, with two numbers of examples


def check_files(folder: Path) -> None:
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(files) == {"record.json", "report.txt", "log.txt", "benchmarks.json", "counters.json"}
    assert sum(files.values()) < 1e6


KINDS = ("ceiling", "cases", "decode", "ragged", "options")


def check_measurements(folder: Path) -> None:
    content = json.loads((folder / "benchmarks.json").read_text())
    assert content["failed"] == {}
    assert content["not_measured"] == []
    assert [len(content[kind]) for kind in KINDS] == [1, 2, 1, 1, 1]
    assert set(content["options"][0]["calls"]["in place"]) == set(card.options.OPTIONS)
    assert set(content["ragged"][0]["contenders"]) == set(card.RAGGED)


def check_tables(folder: Path, tmp_path: Path) -> None:
    text = card_tables.markdown(folder)
    content = json.loads((folder / "benchmarks.json").read_text())
    assert "| blend smooth 3 head |" in text
    x = content["cases"][0]["ratios"]["compress_/copy"]["median"]
    assert f"{card_tables.report.number(x)} (" in text
    for name in ORDER:
        assert f"| {name} | passed |" in text
    for word in ("`compress_paged_`", "71.3", "134", "the numbers mean nothing"):
        assert word in text, word
    page = tmp_path / "page.md"
    page.write_text(f"before\n{card_tables.BEGIN}\nold\n{card_tables.END}\nafter\n")
    assert card_tables.main([str(folder), "--write", str(page)]) == 0
    assert page.read_text() == f"before\n{card_tables.BEGIN}\n\n{text}\n\n{card_tables.END}\nafter\n"


def check_tables_of_a_run_that_was_cut_off(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "record.json").read_text())
    content["steps"] = content["steps"][:1]
    content["running"] = {"name": "examples", "command": "", "limit_s": 1}
    content["not_run"] = {"benchmarks": "not reached"}
    (tmp_path / "record.json").write_text(json.dumps(content))
    text = card_tables.markdown(tmp_path)
    assert "| build | passed |" in text
    assert "| examples | cut off |" in text
    assert "| benchmarks | not run |" in text


def test_tables_of_a_folder_without_a_record_are_refused(tmp_path, capsys):
    assert card_tables.main([str(tmp_path)]) == 2
    assert "record.json is missing" in capsys.readouterr().err


def test_the_tables_have_their_place_in_the_documentation():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert text.count(card_tables.BEGIN) == text.count(card_tables.END) == 1


def test_without_a_card_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu_check", "--results", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert "torch sees no CUDA device" in done.stderr
    assert not any(tmp_path.iterdir())


# -- the benchmark of the card


def test_a_red_check_shows_no_number_and_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(card.verify, "compressed_difference", lambda *a: "wrong on purpose")
    monkeypatch.setattr(card.options, "wrong_choice", lambda device: "wrong on purpose")
    path = tmp_path / "b.json"
    assert card.main(["--device", "cpu", "--tiny", "--json", str(path)]) == 1
    content = json.loads(path.read_text())
    assert set(content["failed"]) == {
        "llama-3.1-8b 32k bfloat16 std",
        "decode bfloat16",
        "ragged 1 x 32k bfloat16",
        "options bfloat16",
        "llama-3.1-8b 32k bfloat16 std beside plain PyTorch",
    }
    assert all("wrong on purpose" in why for why in content["failed"].values())
    assert [len(content[kind]) for kind in KINDS] == [1, 0, 0, 0, 0]


def test_every_measurement_has_a_name_of_its_own_and_the_issues_table_is_in_it():
    made = card.parts(card.Size("cuda"))
    names = [part.name for part in made]
    assert len(set(names)) == len(names)
    for shape in card.SHAPES:
        for tokens in ("4k", "32k", "128k"):
            for dtype in card.DTYPES:
                assert f"{shape} {tokens} {dtype} std" in names
                assert f"{shape} {tokens} {dtype} std beside plain PyTorch" in names
