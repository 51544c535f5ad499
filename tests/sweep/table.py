"""Verdicts as lines, as JSON, and as the tables of docs/cache.md, which ``python -m tests.sweep.table`` writes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers

from tests.sweep.verdict import CANNOT_BE_MADE, DIFFERENT, EQUAL, REFUSED, Outcome, Verdict

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "cache.md"
BEGIN, END = "<!-- python -m tests.sweep.table writes from here -->", "<!-- to here -->"

_ORDER = (EQUAL, REFUSED, CANNOT_BE_MADE, DIFFERENT)
#: Names of cases by the other cells of their row, without order or repetition.
Groups = dict[tuple[str, ...], dict[str, None]]


def line(verdict: Verdict) -> str:
    """The verdict, and below it every outcome that is not simply equal."""
    parts = [f"{verdict.case:36} {verdict.status}{': ' * bool(verdict.reason)}{verdict.reason}"]
    if verdict.evidence:
        parts.append(f"measured: {verdict.evidence}")
    for attention, outcomes in verdict.checks.items():
        parts += [f"{attention}, {check}: {x}" for check, x in outcomes.items() if x != Outcome(EQUAL)]
    return "\n    ".join(parts)


def to_json(verdicts: Iterable[Verdict]) -> str:
    """One verdict a line, so that a difference names its family."""
    found = [dataclasses.asdict(x) for x in verdicts]
    for verdict in found:
        for outcomes in verdict["checks"].values():
            outcomes.update({check: str(Outcome(**x)) for check, x in outcomes.items()})
    versions = json.dumps({"transformers": transformers.__version__, "torch": torch.__version__})
    lines = ",\n".join(json.dumps(x) for x in found)
    return f'{versions[:-1]}, "verdicts": [\n{lines}\n]}}\n'


def of_json(text: str) -> tuple[str, list[Verdict]]:
    """The version of transformers, and its verdicts."""
    document = json.loads(text)
    return document["transformers"], [Verdict.of_json(x) for x in document["verdicts"]]


def markdown(version: str, verdicts: list[Verdict]) -> str:
    """The tables of docs/cache.md."""
    by_verdict: Groups = defaultdict(dict)
    by_mode: Groups = defaultdict(dict)
    for verdict in sorted(verdicts, key=lambda x: _ORDER.index(x.status)):
        by_verdict[(_what(verdict),)][verdict.case] = None
        checks: Groups = defaultdict(dict)  # by the reason
        for outcomes in verdict.checks.values():
            for check, outcome in outcomes.items():
                if outcome.status == REFUSED:
                    checks[(_general(outcome.text),)][check] = None
        for (reason,), refused in checks.items():
            by_mode[", ".join(refused), reason][verdict.case] = None
    families = {x.case.split(" (")[0] for x in verdicts}
    served = sum(x.status == EQUAL for x in verdicts)
    return "\n".join(
        [
            f"Transformers {version}: {len(families)} families in {len(verdicts)} configurations, of which {served} "
            "are served.",
            "",
            *_rows(("verdict",), by_verdict),
            "",
            "Refused, when it is met, in families that are served:",
            "",
            *_rows(("what", "why"), dict(sorted(by_mode.items()))),
        ]
    )


def _rows(columns: tuple[str, ...], groups: Groups) -> list[str]:
    lines = [(*columns, "`model_type`"), ("---",) * (len(columns) + 1)]
    lines += [(*cells, ", ".join(cases)) for cells, cases in groups.items()]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _what(verdict: Verdict) -> str:
    """The verdict in the words that families of a kind share."""
    if verdict.status == EQUAL:
        others = " and ".join(verdict.left_alone)
        return f"equal; left alone: {others}" if others else "equal; every layer is compressed"
    if verdict.status == CANNOT_BE_MADE:
        return "cannot be made tiny, so nobody judged it: refused until admitted"
    return f"{verdict.status}: {_general(verdict.reason)}"


def _general(reason: str) -> str:
    """A reason without what is particular to one model."""
    if "has not judged" in reason:
        return "nobody judged it, since its model takes no cache"
    text = re.sub(r" \([^()]*\)", "", reason)
    for particular in (
        r"; the (static )?caches of its.*",
        r", which a layer of this model.*",
        r": [a-z ]+ sequences of equal.*",
        r"\. [A-Z].*",
        r": its tokens begin in.*",
        r", \[B, \d+\]; the model.*",
        r" of these \d+ tokens",
        r" of sequence \d+",
    ):
        text = re.sub(particular, "", text)
    return re.sub(r"layers \[[\d, ]+\]", "some layers", text).replace("|", "\\|")


def write_page() -> None:
    """The tables of the committed results into docs/cache.md."""
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{markdown(*of_json(RESULTS.read_text()))}\n{END}{after}")


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m tests.sweep.table", description="Write results.json into docs/cache.md."
    ).parse_args()
    write_page()
