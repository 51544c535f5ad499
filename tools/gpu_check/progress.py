"""A pytest plugin that writes each test's result as it ends, so that a killed run is not lost.

``pytest -p tools.gpu_check.progress``; ``LAGKV_PROGRESS`` names the file, which gets one JSON object a line.
"""

from __future__ import annotations

import json
import os

import pytest

MESSAGE = 1500  # characters kept of a failure


@pytest.hookimpl
def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's workers report to the process that writes
        config.pluginmanager.register(Progress(os.environ["LAGKV_PROGRESS"]), "lagkv-progress")


class Progress:
    def __init__(self, path: str) -> None:
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  (open until pytest ends)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report.nodeid, report.outcome, report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome == "failed":
            self._write(report.nodeid, report.outcome, report.longreprtext)

    def _write(self, test: str, outcome: str, text: str) -> None:
        message = text.strip()[-MESSAGE:] if outcome == "failed" else ""
        self._file.write(json.dumps({"test": test, "outcome": outcome, "message": message}) + "\n")
