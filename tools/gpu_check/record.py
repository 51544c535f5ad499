"""Records what ran, what did not and why: ``record.json`` for programs, ``report.txt`` for people."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.gpu_check.steps import Outcome

SCHEMA = 1
FAILURES_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Counts:
    """Results of a pytest run that may have been killed, as ``progress.py`` wrote them test by test."""

    passed: int
    failed: int
    skipped: int
    failures: list[dict[str, str]]  #: test and message

    @classmethod
    def read(cls, path: Path) -> Counts:
        counts = {"passed": 0, "failed": 0, "skipped": 0}
        failures = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                result = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was killed while it wrote
                continue
            counts[result["outcome"]] += 1
            if result["outcome"] == "failed" and len(failures) < FAILURES_SHOWN:
                failures.append({"test": result["test"], "message": result["message"]})
        return cls(**counts, failures=failures)

    def __str__(self) -> str:
        return f"{self.passed} tests passed, {self.failed} failed, {self.skipped} skipped"


class Record:
    """Written anew at every change, in one step, so that a reader or a kill never meets half of it."""

    def __init__(self, folder: Path, machine: dict[str, Any], minutes: float) -> None:
        self.folder = folder
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "machine": machine,
            "minutes": minutes,
            "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "running": None,
            "steps": [],
            "not_run": {},
        }

    def not_run(self, name: str, reason: str) -> None:
        self.content["not_run"][name] = reason

    def begins(self, name: str, command: str, limit_s: float) -> None:
        self.content["not_run"].pop(name, None)
        self.content["running"] = {"name": name, "command": command, "limit_s": round(limit_s, 1)}

    def ended(self, name: str, command: str, limit_s: float, outcome: Outcome) -> None:
        self.content["running"] = None
        if outcome.verdict == "not run":
            self.not_run(name, outcome.reason)
        tests = outcome.tests
        self.content["steps"].append(
            {
                "name": name,
                "command": command,
                "verdict": outcome.verdict,
                "reason": outcome.reason,
                "exit_status": outcome.exit_status,
                "seconds": round(outcome.seconds, 1),
                "limit_s": round(limit_s, 1),
                "tests": dataclasses.asdict(tests) if tests is not None else None,
                "tail": outcome.tail,
            }
        )

    def save(self) -> None:
        replace(self.folder / "record.json", json.dumps(self.content, indent=1) + "\n")
        replace(self.folder / "report.txt", self.report())

    def report(self) -> str:
        c = self.content
        lines = [f"{name}: {value}" for name, value in c["machine"].items()]
        lines += [f"started: {c['started']}, for {c['minutes']:g} minutes", ""]
        for step in c["steps"]:
            if step["verdict"] != "not run":
                lines.append(f"{step['verdict']:<8} {step['seconds']:>7.1f} s  {step['name']}{_about(step)}")
        if c["running"]:
            lines.append(f"running, at most {c['running']['limit_s']:.0f} s: {c['running']['name']}")
        lines += [f"not run            {name}: {reason}" for name, reason in c["not_run"].items()]
        for step in c["steps"]:
            if step["verdict"] == "FAILED":
                lines += ["", f"--- {step['name']} failed: {step['reason']}"]
                for failure in (step["tests"] or {"failures": []})["failures"]:
                    lines += [f"    {failure['test']}", f"        {failure['message']}"]
                lines += ["    end of its output:", *(f"    {line}" for line in step["tail"])]
        return "\n".join(lines) + "\n"


def _about(step: dict[str, Any]) -> str:
    tests = step["tests"]
    counts = ""
    if tests is not None:
        counts = f": {tests['passed']} tests passed, {tests['failed']} failed, {tests['skipped']} skipped"
    return f"{counts} ({step['reason']})" if step["reason"] else counts


def replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
