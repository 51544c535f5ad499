"""Removes barriers, bounds checks and rules from the CUDA kernels, one at a time, and asks the tests to notice.

``python tools/mutate_kernels.py [--only WORD] [--rules] [--list]``: every ``__syncthreads`` and ``__syncwarp`` of the
kernels (not with ``--rules``) and every entry of ``RULES`` is a mutant. Its float32 kernels are compiled into the
executor, and the planner, traffic and property tests run on them until one fails. Prints what caught each mutant; ends
with status 1 where one survives.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "cuda"
WORK = ROOT / "build" / "mutants"
# (file, what to find, what to put there, what it removes)
RULES = [
    ("rows.cuh", "exists && seat.channel(chunk) < dim", "seat.channel(chunk) < dim", "load: rows end"),
    ("rows.cuh", "exists && seat.channel(chunk) < dim", "exists", "load: channels end"),
    ("rows.cuh", "if (j >= count) break;", "", "copy: rows end"),
    ("rows.cuh", "if (channel < dim) st_global", "st_global", "copy: channels end"),
    (
        "partition.cuh",
        "aim.scores && exists && seat.lane == 0",
        "aim.scores && seat.lane == 0",
        "statistic: rows end",
    ),
    ("partition.cuh", "const bool exists = t < count;", "const bool exists = true;", "stream: rows end"),
    ("std_score.cuh", "kLanes && channel < dim) {", "kLanes) {", "bounds: channels end"),
    ("cosine_score.cuh", "kLanes && channel < dim) {", "kLanes) {", "anchor: channels end"),
    (
        "std_score.cuh",
        "if (seat.channel(c / Layout::kElements) < dim) squares",
        "squares",
        "deviation: channels end",
    ),
    ("std_score.cuh", "if (seat.channel(chunk) >= dim) continue;", "", "bounds loaded: channels end"),
    ("std_score.cuh", "if (exists) {", "{", "bounds: rows end"),
    ("block.cuh", "i < static_cast<unsigned>(count) ? choose", "true ? choose", "compaction: scores end"),
    (
        "gather.cuh",
        "position >= 0 && position < args.length",
        "position < args.length",
        "compact: negative position",
    ),
    (
        "gather.cuh",
        "position >= 0 && position < args.length",
        "position >= 0",
        "compact: position beyond the end",
    ),
    ("gather.cuh", "if (j >= rows) continue;", "", "compact: rows end (read)"),
    ("gather.cuh", "if (j < rows) st_global", "st_global", "compact: rows end (write)"),
    ("gather.cuh", "works(row < rows_per_step)", "works(true)", "rows that do not fill a pass"),
    (
        "gather.cuh",
        "if (share.works && j < rows) moved",
        "if (share.works) moved",
        "move: rows end (read)",
    ),
    (
        "gather.cuh",
        "if (share.works && j < rows) st_global",
        "if (share.works) st_global",
        "move: rows end (write)",
    ),
    ("topk.cuh", "i < count ? ordered", "true ? ordered", "topk: scores end"),
    ("score_run.cuh", "if (args.index != nullptr) {", "if (false) {", "zeros behind the scores"),
    (
        "compress.cuh",
        "(first + plan.run < plan.partitions ? first + plan.run : plan.partitions) - 1",
        "first + plan.run - 1",
        "last run: partitions end",
    ),
    (
        "compress.cuh",
        "total - first < kCopyRows ? total - first : kCopyRows",
        "kCopyRows",
        "last tile: rows end",
    ),
    ("select.cuh", "(others[n] == mine && j + n < i)", "false", "rank: ties"),
    (
        "select.cuh",
        "(others[n] == mine && j + n < i)",
        "(others[n] == mine && j + n > i)",
        "rank: lower position wins",
    ),
    ("select.cuh", "bits == last.key ? Choice::kTie", "bits == last.key ? Choice::kKeep", "radix: ties"),
    (
        "block.cuh",
        "(choice == Choice::kTie && tied < ties)",
        "choice == Choice::kTie",
        "compaction: number of ties",
    ),
    ("numeric.cuh", "  if (x != x) return 0xFFFFFFFFu;\n", "", "NaN ranks highest"),
    ("numeric.cuh", "bits_as<uint32_t>(x + 0.0f)", "bits_as<uint32_t>(x)", "-0 equals +0"),
    # Not `low == high ? Real(0)` of the scale: without it such rows are computed again exactly, slower but right.
    ("std_score.cuh", "low == high ? 0.0 :", "", "y = 0 where bounds are equal"),
    ("partition.cuh", "if (repair) {", "if (false) {", "rows computed again exactly"),
    ("numeric.cuh", "return a < b || a != a ? a : b;", "return a < b ? a : b;", "NaN in a lower bound"),
    ("numeric.cuh", "return a > b || a != a ? a : b;", "return a > b ? a : b;", "NaN in an upper bound"),
    ("std_score.cuh", "  if (dim == 1) return Real(0);\n", "", "D = 1"),
    ("std_score.cuh", "  if (dim == 0) return not_a_number<Real>();\n", "", "D = 0"),
    ("score.cuh", "count == 1 || spread == Real(0)", "spread == Real(0)", "L = 1"),
    ("score.cuh", "count == 1 || spread == Real(0)", "count == 1", "no deviation"),
    ("score.cuh", "key.get(0), value.get(0)", "Real(0), Real(0)", "equal statistics have no deviation"),
    ("cosine_score.cuh", "norm == Real(0) ? Real(0) : quick", "quick", "a row of norm 0"),
    ("cosine_score.cuh", "if (norm == infinity<Real>(0)) norm = Real(0);", "", "a row of infinite norm"),
    (
        "cosine_score.cuh",
        "fused(fused(-quotient, norm, x), inverse, quotient)",
        "quotient",
        "exact division by the norm",
    ),
    ("cosine_score.cuh", "if (!first) {", "if (false) {", "anchors of long partitions"),
    ("wide_rows.cuh", "divisor == Real(0) ? Real(0) : x / divisor", "x / divisor", "wide: a row of norm 0"),
    (
        "score_run.cuh",
        "launch.scratch + blockIdx.x * launch.plan.storage.scratch_bytes",
        "launch.scratch",
        "scratch of a block of its own",
    ),
    (
        "launches.h",
        "launch.first_job += device.max_grid",
        "launch.first_job += blocks",
        "more blocks than a grid",
    ),
    ("../ragged.h", "start < 0 || length < 0 ||", "length < 0 ||", "ragged: negative start"),
    # Not `length < 0`: without it such a sequence has no partition and no row, and stays as it is all the same.
    ("../ragged.h", "length < 0 || length > capacity", "length < 0", "ragged: length beyond the capacity"),
    ("ragged_schedule.cuh", "block < 0 || block >= args.blocks", "block >= args.blocks", "a negative block"),
    ("ragged_schedule.cuh", "block < 0 || block >= args.blocks", "block < 0", "a block behind the pool"),
    (
        "ragged_schedule.cuh",
        "if (args.key.block_table != nullptr && ",
        "if (false && ",
        "a sequence with a block outside the pool",
    ),
    ("ragged_schedule.cuh", "packed && ld_global(args.key.offsets) != 0", "false", "cu_seqlens begin with 0"),
    ("ragged_schedule.cuh", "last < first || last >", "last >", "cu_seqlens do not decrease"),
    (
        "ragged_schedule.cuh",
        "last < first || last > args.capacity",
        "last < first",
        "cu_seqlens end with the rows",
    ),
    ("ragged_schedule.cuh", "b < entries && ld_global_nc", "ld_global_nc", "search: sequences end"),
    ("ragged_schedule.cuh", "if (before < threads) break;", "break;", "search: more sequences than threads"),
    ("ragged_schedule.cuh", "if (b < args.batch + 2) {", "{", "schedule: sequences end"),
    (
        "ragged_compress.cuh",
        "(first + run < partitions ? first + run : partitions) - 1",
        "first + run - 1",
        "ragged: last run: partitions end",
    ),
    ("ragged_compress.cuh", "from(j) < length ? from(j) : -1", "from(j)", "-1 past the new length"),
    (
        "ragged_compress.cuh",
        "entries - first < tile ? entries - first : tile",
        "tile",
        "ragged: last tile: entries end",
    ),
    (
        "ragged_compress.cuh",
        "|| first >= stay) return;",
        ") return;",
        "ragged: rows behind the last sequence",
    ),
]
CAUGHT = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - (.*))?$", re.MULTILINE)
# Runs in a process of its own: the executor's module of the mutant, float32 alone.
RUNNER = """
import dataclasses, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import types, torch
source = Path({tests!r}, "cases.py")
text = source.read_text(encoding="utf-8")
wide = "DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)"
assert wide in text
sys.modules["cases"] = types.ModuleType("cases")
exec(compile(text.replace(wide, "DTYPES = (torch.float32,)"), source, "exec"), sys.modules["cases"].__dict__)
import simt, simt.build
sys.modules["simt.build"].build_module = lambda **_: Path({module!r})
import conftest  # its Hypothesis profile must be there when the tests below are decorated: without deadlines
import pytest, test_cuda_plan, test_ragged_plan, test_ragged_traffic, test_traffic
for of_module in (test_ragged_plan.CASES, test_ragged_traffic.CASES):
    of_module.update({{name: dataclasses.replace(case, dtype=torch.float32) for name, case in of_module.items()}})
test_cuda_plan.CASES.update(
    {{name: dataclasses.replace(case, dtype=torch.float32) for name, case in test_cuda_plan.CASES.items()}}
)
test_traffic.SHAPES.update(
    {{name: dataclasses.replace(shape, dtype=torch.float32) for name, shape in test_traffic.SHAPES.items()}}
)
sys.exit(pytest.main(["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", *{arguments!r}]))
"""
MUTATED = ("bind_lagkv_float32", "bind_ragged_float32")
# Cheap and telling first.
TESTS = [
    ["tests/test_cuda_plan.py", "-k", "depend or traps or scattered or keeping or direction"],
    ["tests/test_ragged_plan.py", "-k", "depend or any or more"],
    ["tests/test_ops_properties.py", "--backend", "simt"],
    ["tests/test_ragged_properties.py", "--backend", "simt", "-k", "not traps"],
    ["tests/test_ops_traps.py", "--backend", "simt"],
    ["tests/test_metamorphic.py", "--backend", "simt", "-k", "exactly_zero or beyond_the"],
    ["tests/test_traffic.py", "-k", "scratch or vectors or stages or in_place"],
    ["tests/test_large.py", "--backend", "simt", "-k", "partition or llama"],
]


def barriers() -> list[tuple[str, str, str, str]]:
    """One mutant per barrier: the text up to and with it is what is found, so that it is that one."""
    found = []
    for path in sorted(KERNELS.glob("*.cuh")):
        if path.name == "simt.cuh":
            continue
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"__sync(?:threads|warp)\(\);|= __syncthreads_or\((\w+)\);", text):
            line = text.count("\n", 0, match.start()) + 1
            without = f"= {match[1]};" if match[1] else ";"
            found.append(
                (path.name, text[: match.end()], text[: match.start()] + without, f"barrier in line {line}")
            )
    return found


def commands() -> tuple[dict[str, str], list[str], Path]:
    """How CMake compiles the float32 bindings (by name), the objects of the module, and the build folder."""
    sys.path.insert(0, str(ROOT / "tests"))
    from simt.build import build_module

    module = build_module()
    folder = next(parent for parent in module.parents if (parent / "build.ninja").exists())
    database = json.loads((folder / "compile_commands.json").read_text(encoding="utf-8"))
    found = {Path(item["file"]).stem: item["command"] for item in database}
    objects = [str(path) for path in sorted(folder.glob("tests/simt/CMakeFiles/lagkv_simt.dir/*.o"))]
    return {name: found[name] for name in MUTATED}, objects, folder


def build_mutant(folder: Path, compilers: dict[str, str], objects: list[str], build: Path) -> Path | str:
    """The mutated module, or why it does not compile."""
    targets = []
    for name, command in compilers.items():
        words = [word for word in shlex.split(command) if not word.endswith("ccache")]
        targets.append(str(folder / f"{name}.o"))
        words[words.index("-o") + 1] = targets[-1]
        words = [word.replace(str(ROOT / "csrc"), str(folder / "csrc")) for word in words]
        done = subprocess.run(words, cwd=build, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return done.stderr
    module = folder / next(build.glob("tests/simt/lagkv_simt*.so")).name
    # The mutant's objects come first: of templates that several objects hold the linker takes the first.
    others = [path for path in objects if not any(name in path for name in compilers)]
    link = [words[0], "-shared", "-o", str(module), *targets, *others]
    subprocess.run(link, cwd=build, capture_output=True, text=True, check=True)
    return module


def judge(folder: Path, module: Path) -> str:
    """The first test that fails on the mutant and how, or an empty text."""
    for arguments in TESTS:
        program = RUNNER.format(
            root=str(ROOT), tests=str(ROOT / "tests"), module=str(module), arguments=arguments
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,
            env={**os.environ, "HYPOTHESIS_PROFILE": "ci"},
        )
        (folder / "tests.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode not in (0, 1):
            return f"{arguments[0]} ended with status {done.returncode}"
        if done.returncode == 1:
            test = CAUGHT.search(done.stdout)
            if test is None:
                raise SystemExit(f"mutate_kernels: the tests did not run:\n{done.stdout}{done.stderr}")
            fault = re.search(r"(?:Fault|Error): ([^;\n]*)", done.stdout)
            return f"{test[1]}: {fault[1][:110] if fault else 'assertion'}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="mutants whose file or description holds this word")
    parser.add_argument("--rules", action="store_true", help="leave out the barriers")
    parser.add_argument("--list", action="store_true", help="name the mutants and stop")
    options = parser.parse_args()
    mutants = [
        m
        for m in [*([] if options.rules else barriers()), *RULES]
        if not options.only or options.only in f"{m[0]}: {m[3]}"
    ]
    if options.list:
        print("\n".join(f"{file}: {what}" for file, _, _, what in mutants))
        return 0
    compilers, objects, build = commands()
    survivors = 0
    for file, old, new, what in mutants:
        folder = WORK / re.sub(r"\W+", "-", f"{file} {what}")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("*.o"))
        path = folder / "csrc" / "cuda" / file
        text = path.read_text(encoding="utf-8")
        if old not in text:
            raise SystemExit(f"mutate_kernels: {file} no longer holds {old!r} ({what})")
        path.write_text(text.replace(old, new), encoding="utf-8")
        module = build_mutant(folder, compilers, objects, build)
        caught = judge(folder, module) if isinstance(module, Path) else f"does not compile: {module[:200]}"
        survivors += not caught
        print(f"{'caught  ' if caught else 'SURVIVED'} {file}: {what} | {caught}", flush=True)
    print(f"{len(mutants)} mutants, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
