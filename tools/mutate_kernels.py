"""Removes barriers, bounds checks and rules from the CUDA kernels, one at a time, and asks the tests to notice.

``python tools/mutate_kernels.py [--only WORD] [--part I/N] [--jobs N] [--list]``: every barrier of the kernels and
every entry of kernel_rules.json is a mutant. Its kernels of one type (float32 mostly) are compiled into the executor,
and the planner, traffic and property tests run on them until one fails, after a run with nothing removed, in which none
may. Prints what caught each mutant; ends with status 1 where one survives.

kernel_rules.json holds, by file (of csrc/cuda), rows of [what is then missing, text, its replacement, dtypes]: the text
is replaced wherever it occurs in the file; without dtypes, float32 is compiled. It names every check of a bound, every
rule for ties, NaN, zeros and special sizes, everything that stands in for a barrier, and whatever keeps an access
aligned or inside shared memory. Not there, as nothing but speed or memory depends on it: conditions that another one
implies, early ends of loops, the choice between methods of one result. Nor what only a card can show: long sums in two
levels (their error at 65,536 tokens) and the assembly in simt.cuh.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "cuda"
RULES = Path(__file__).with_name("kernel_rules.json")
WORK = ROOT / "build" / "mutants"
BARRIER = re.compile(r"__sync(?:threads|warp)\(\);|= __syncthreads_or\((\w+)\);")
CAUGHT = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - (.*))?$", re.MULTILINE)
TIMEOUT_S = 900


class Rule(NamedTuple):
    """``find`` in ``file`` (of csrc/cuda) becomes ``replace``, wherever it occurs; ``what`` is then missing."""

    file: str
    what: str
    find: str
    replace: str
    dtype: str = "float32"  #: of the kernels that are compiled with it


CONTROL = Rule("layout.cuh", "nothing", "#pragma once", "#pragma once")
# Runs in a process of its own: the executor's module of the mutant, one type alone.
RUNNER = """
import dataclasses, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import types, torch
source = Path({root!r}, "tests/ops/cases.py")
text = source.read_text(encoding="utf-8")
wide = "DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)"
assert wide in text
import tests.ops
cases = tests.ops.cases = sys.modules["tests.ops.cases"] = types.ModuleType("tests.ops.cases")
exec(compile(text.replace(wide, "DTYPES = (torch.{dtype},)"), source, "exec"), cases.__dict__)
import tests.simt.build
tests.simt.build.build_module = lambda **_: Path({module!r})
import tests.conftest  # its Hypothesis profile must be there when the tests below are decorated: without deadlines
import pytest
from tests.cuda import test_blocks_plan, test_plan, test_ragged_plan, test_ragged_traffic, test_traffic
plans = test_plan.CASES, test_ragged_plan.CASES, test_blocks_plan.CASES
for of_module in (*plans, test_ragged_traffic.CASES, test_traffic.SHAPES, cases.TRAPS):
    of_module.update({{name: dataclasses.replace(case, dtype=torch.{dtype}) for name, case in of_module.items()}})
for arguments in {selections!r}:
    status = pytest.main(["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", *arguments])
    if status != 0:
        sys.exit(status)
"""
RAGGED_OPTIONS = "test_ragged or slots or pages"
DENSE_OPTIONS = f"not ({RAGGED_OPTIONS} or threads or chunks or python)"
# By the bindings whose kernels they run; cheap and telling first, after those that look at the file itself.
TESTS = {
    "lagkv": [
        ("tests/cuda/test_plan.py", "depend and long"),
        ("tests/cuda/test_plan.py", "not (depend and long)"),
        ("tests/ops/test_traps.py", ""),
        ("tests/cuda/test_alignment.py", ""),
        ("tests/ops/test_options.py", DENSE_OPTIONS),
        ("tests/ops/test_properties.py", ""),
        ("tests/ops/test_metamorphic.py", "exactly_zero or beyond_the or bounds_far"),
        ("tests/cuda/test_traffic.py", "scratch or vectors or stages or in_place"),
        ("tests/ops/test_large.py", "partition or llama"),
    ],
    "ragged": [
        ("tests/cuda/test_ragged_plan.py", "depend and long"),
        ("tests/cuda/test_ragged_plan.py", "not (depend and long)"),
        ("tests/cuda/test_alignment.py", ""),
        ("tests/ops/test_options.py", RAGGED_OPTIONS),
        ("tests/ops/test_ragged_properties.py", "not traps"),
        ("tests/cuda/test_ragged_traffic.py", "in_place"),
        ("tests/ops/test_ragged_errors.py", "wrong_values or shared"),
        ("tests/cuda/test_blocks_plan.py", ""),
        ("tests/ops/test_blocks_properties.py", "not traps"),
        ("tests/ops/test_blocks_errors.py", "wrong_values"),
    ],
}
FIRST = {
    "lagkv": {
        "block.cuh": ("tests/cuda/test_plan.py", "depend and many-scores and long"),
        "select.cuh": ("tests/cuda/test_plan.py", "depend and many-scores and long"),
        "topk.cuh": ("tests/ops/test_properties.py", "topk_index"),
        "numeric.cuh": ("tests/ops/test_properties.py", "topk_index"),
        "compact.cuh": ("tests/ops/test_properties.py", "compact"),
        "move.cuh": ("tests/ops/test_properties.py", "in_place"),
        "launch.h": ("tests/cuda/test_alignment.py", ""),
        "plan.h": ("tests/cuda/test_plan.py", "covers or limit or moves"),
        "storage.h": ("tests/cuda/test_plan.py", "covers or limit or moves"),
        "blend_statistic.cuh": ("tests/ops/test_options.py", DENSE_OPTIONS),
        "rivals.cuh": ("tests/ops/test_options.py", DENSE_OPTIONS),
        "staged.h": ("tests/ops/test_options.py", DENSE_OPTIONS),
    },
    "ragged": {
        "schedule.cuh": ("tests/cuda/test_ragged_plan.py", "any or pages or more"),
        "gather.cuh": ("tests/ops/test_options.py", RAGGED_OPTIONS),
        "../ragged.h": ("tests/cuda/test_ragged_plan.py", "any or pages"),
        "blocks.cuh": ("tests/cuda/test_blocks_plan.py", ""),
        "../blocks.h": ("tests/cuda/test_blocks_plan.py", ""),
    },
}
BY_BACKEND = (
    "test_traps",
    "test_properties",
    "test_ragged_properties",
    "test_metamorphic",
    "test_large",
    "test_options",
)
BY_BACKEND += ("test_ragged_errors", "test_blocks_properties", "test_blocks_errors")


def rules() -> list[Rule]:
    """One mutant per entry of kernel_rules.json and type."""
    tables = json.loads(RULES.read_text(encoding="utf-8"))
    return [
        Rule(file, what, find, replace, dtype)
        for file, rows in tables.items()
        for what, find, replace, *dtypes in rows
        for dtype in (dtypes[0] if dtypes else ["float32"])
    ]


def barriers() -> list[Rule]:
    """One mutant per barrier: the text up to and with it is what is found, so that it is that one."""
    found = []
    for path in sorted(KERNELS.glob("*.cuh")):
        if path.name == "simt.cuh":
            continue
        text = path.read_text(encoding="utf-8")
        for match in BARRIER.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            without = f"= {match[1]};" if match[1] else ";"
            before = text[: match.start()]
            found.append(Rule(path.name, f"barrier in line {line}", text[: match.end()], before + without))
    return found


class Executor:
    """The executor as CMake builds it: commands, objects, and what every binding of kernels includes."""

    def __init__(self) -> None:
        sys.path.insert(0, str(ROOT))
        from tests.simt.build import build_module

        module = build_module()
        self.build = next(parent for parent in module.parents if (parent / "build.ninja").exists())
        database = json.loads((self.build / "compile_commands.json").read_text(encoding="utf-8"))
        self.commands = {Path(item["file"]).stem: self._words(item["command"]) for item in database}
        self.objects = sorted(self.build.glob("tests/simt/CMakeFiles/lagkv_simt.dir/*.o"))
        self.module = next(self.build.glob("tests/simt/lagkv_simt*.so"))
        self._included: dict[str, set[Path]] = {}

    @staticmethod
    def _words(command: str) -> list[str]:
        words = [word for word in shlex.split(command) if not word.endswith("ccache")]
        return [*words, "-O1", "-w"]  # half the time of -O2

    def includes(self, name: str, path: Path) -> bool:
        """Does this source see that header?"""
        if name not in self._included:
            words = [x for x in self.commands[name] if x not in ("-c",)]
            words[words.index("-o") + 1] = "/dev/stdout"
            done = subprocess.run([*words, "-MM"], cwd=self.build, capture_output=True, text=True, check=True)
            names = done.stdout.replace("\\\n", " ").split(": ", 1)[1].split()
            self._included[name] = {(self.build / x).resolve() for x in names}
        return path.resolve() in self._included[name]

    def affected(self, rule: Rule, family: str) -> list[str]:
        """The bindings to compile anew."""
        names = [f"bind_{family}_{rule.dtype}", "bind_lagkv_plan"]
        return [x for x in names if self.includes(x, KERNELS / rule.file)]

    def mutate(self, rule: Rule, names: list[str], folder: Path) -> Path:
        """The module with the rule missing in these bindings."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("*.o"))
        path = folder / "csrc" / "cuda" / rule.file
        text = path.read_text(encoding="utf-8")
        if rule.find not in text:
            raise SystemExit(f"mutate_kernels: {rule.file} no longer holds {rule.find!r} ({rule.what})")
        path.write_text(text.replace(rule.find, rule.replace), encoding="utf-8")
        targets = []
        # Included folders are named from the build folder or wholly.
        own = rf"(?:{re.escape(str(ROOT / 'csrc'))}|{re.escape(os.path.relpath(ROOT / 'csrc', self.build))})(?=$|/)"
        for name in names:
            words = list(self.commands[name])
            targets.append(str(folder / f"{name}.o"))
            words[words.index("-o") + 1] = targets[-1]
            words = [re.sub(own, str(folder / "csrc"), x) for x in words]
            done = subprocess.run(words, cwd=self.build, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SystemExit(
                    f"mutate_kernels: {rule.file}: {rule.what}: does not compile:\n{done.stderr}"
                )
        module = folder / self.module.name
        # The mutant's objects come first: of templates that several objects hold the linker takes the first.
        others = [str(path) for path in self.objects if not any(f"{name}.cpp" in path.name for name in names)]
        link = [self.commands[names[0]][0], "-shared", "-o", str(module), *targets, *others]
        subprocess.run(link, cwd=self.build, capture_output=True, text=True, check=True)
        return module

    def judge(self, rule: Rule, family: str, folder: Path, module: Path) -> str:
        """The first test that fails on the mutant and how, or an empty text."""
        selections = []
        first = FIRST[family].get(rule.file)
        for tests, words in [*([first] if first else []), *TESTS[family]]:
            backend = ["--backend", "simt"] if Path(tests).stem in BY_BACKEND else []
            selections.append([tests, *(["-k", words] if words else []), *backend])
        program = RUNNER.format(
            root=str(ROOT),
            module=str(module),
            selections=selections,
            dtype=rule.dtype,
        )
        try:
            done = subprocess.run(
                [sys.executable, "-c", program],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
                timeout=TIMEOUT_S,
                env={**os.environ, "HYPOTHESIS_PROFILE": "ci", "OMP_NUM_THREADS": "1"},
            )
        except subprocess.TimeoutExpired:
            return f"no end within {TIMEOUT_S} s"
        (folder / "tests.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode < 0:
            return f"the tests ended with signal {-done.returncode}"
        if done.returncode == 0:
            return ""
        test = CAUGHT.search(done.stdout)
        if done.returncode != 1 or test is None:  # an error of collection, or no test
            raise SystemExit(f"mutate_kernels: the tests did not run:\n{done.stdout}{done.stderr}")
        fault = re.search(r"(?:Fault|Error): ([^;\n]*)", done.stdout)
        return f"{test[1]}: {fault[1][:110] if fault else 'assertion'}"

    def verdict(self, rule: Rule) -> str:
        """Names what caught it; empty where nothing did."""
        folder = WORK / re.sub(r"\W+", "-", f"{rule.file} {rule.what} {rule.dtype}")
        caught = ""
        for family in TESTS:
            names = self.affected(rule, family)
            if not names or (family == "ragged" and names == ["bind_lagkv_plan"]):
                continue
            module = self.mutate(rule, names, folder)
            if caught := self.judge(rule, family, folder, module):
                break
        for path in folder.glob("*.[os]*"):
            path.unlink()
        return caught


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="mutants whose file or description holds this word")
    parser.add_argument("--part", default="1/1", help="the I-th of N parts of the mutants, as I/N")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="name the mutants and stop")
    options = parser.parse_args()
    mutants = [
        m for m in [*barriers(), *rules()] if not options.only or options.only in f"{m.file}: {m.what}"
    ]
    part, parts = map(int, options.part.split("/"))
    mutants = mutants[part - 1 :: parts]
    if options.list:
        print("\n".join(f"{m.file}: {m.what}" for m in mutants))
        return 0
    executor = Executor()
    if caught := executor.verdict(CONTROL):
        raise SystemExit(f"mutate_kernels: with nothing removed {caught}")
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for m, caught in zip(mutants, pool.map(executor.verdict, mutants), strict=True):
            survivors += not caught
            print(f"{'caught  ' if caught else 'SURVIVED'} {m.file}: {m.what} | {caught}", flush=True)
    print(f"{len(mutants)} mutants, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
