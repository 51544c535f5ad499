"""``python -m benchmarks.card_tables benchmarks/results/CARD``: Markdown tables of what ``make gpu-check`` left there.

``--write docs/performance.md`` puts them between the marker lines of that file. What was not measured is listed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report, tables
from benchmarks.cases import tokens_text
from lagkv_ext.commands.stages import COPY

BEGIN, END = "<!-- begin: python -m benchmarks.card_tables -->", "<!-- end: card -->"
_RATIOS = (
    ("compress_", "copy"),
    ("compress", "clone"),
    ("compiled", "compress"),
    ("eager", "compress"),
)


def markdown(folder: Path) -> str:
    record = tables.load(folder / "record.json")
    if record is None:
        raise tables.TablesError(f"{folder}/record.json is missing: make gpu-check writes it")
    measured = tables.load(folder / "benchmarks.json") or {}
    counters = tables.load(folder / "counters.json") or {}
    parts = [
        _head(record, measured, folder),
        _steps(record),
        _operators(measured.get("cases", [])),
        _decode(measured.get("decode", [])),
        _ragged(measured.get("ragged", [])),
        _options(measured.get("options", [])),
        _counters(counters.get("problems", {})),
    ]
    return "\n\n".join(part for part in parts if part)


def _head(record: dict[str, Any], measured: dict[str, Any], folder: Path) -> str:
    m = record["machine"]
    commit = m["commit"] or f"sources {m['sources']}"
    packages = ", ".join(
        f"{name} {m['packages'][name]}" for name in ("torch", "transformers") if m["packages"].get(name)
    )
    text = (
        f"{m['card']}, {packages}, commit {commit}, {record['started'].split()[0]}; "
        f"`make gpu-check MINUTES={record['minutes']:g}`, raw numbers in "
        f"[{folder.name}](../benchmarks/results/{folder.name}). "
        "Ratios are medians of ratios within rounds (quartiles), L2 cold, "
        "one layer's cache, a quarter kept of each partition of 128; **bold** misses its target."
    )
    for ceiling in measured.get("ceiling", []):
        text += f" Copying {ceiling['bytes'] / 1e9:.1f} GB moves {ceiling['gb_per_s']:.0f} GB/s."
    if measured.get("tiny"):
        text += " **A rehearsal on tiny shapes: the numbers mean nothing.**"
    return text


def _steps(record: dict[str, Any]) -> str:
    rows = []
    for step in record["steps"]:
        tests = step["tests"]
        told = f"{tests['passed']} passed, {tests['failed']} failed" if tests else ""
        rows.append((step["name"], step["verdict"], f"{step['seconds']:.0f}", told, step["reason"]))
    seen = {row[0] for row in rows}
    if record["running"]:
        rows.append((record["running"]["name"], "cut off", "", "", "the run was ended in its middle"))
    rows += [(name, "not run", "", "", why) for name, why in record["not_run"].items() if name not in seen]
    return tables.table(("step", "result", "s", "tests", "why"), rows, left=5)


def _operators(cases: Sequence[dict[str, Any]]) -> str:
    """A line for each problem; ratios may come from two measurements, beside copying and beside plain PyTorch."""
    merged: dict[str, dict[str, Any]] = {}
    for case in cases:
        known = merged.setdefault(case["problem_name"], {**case, "ratios": {}, "contenders": {}})
        known["ratios"] = {**case["ratios"], **known["ratios"]}
        known["contenders"] = {**case["contenders"], **known["contenders"]}
    rows = []
    for case in merged.values():
        p, times = case["problem"], case["contenders"]
        best = times["compress_"]
        share = best["copy_share"]
        rows.append(
            (
                f"{case['shape']}, {p['heads']} x {tokens_text(p['tokens'])} x {p['key_dim']}",
                p["dtype"],
                p["score"],
                report.number(1e6 * best["seconds"]["median"]),
                report.number(best["gb_per_s"]),
                "" if share is None else f"{100 * share:.0f}%",
                *(tables.ratio(case, pair) for pair in _RATIOS),
            )
        )
    if not rows:
        return ""
    targets = [report.TARGETS[pair][1] for pair in _RATIOS]
    head = ("layer, H x N x D", "dtype", "score", "`compress_`, us", "GB/s", "of copy's rate")
    return tables.table(
        (*head, *(report.ratio_name(pair) for pair in _RATIOS)),
        [("target", *[""] * 5, *targets), *rows],
        left=3,
    )


def _decode(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for x in results:
        graph = x["over_copy_graph"]
        rows.append(
            (
                x["dtype"],
                str(x["layers"]),
                report.number(x["us_per_layer"]["compress_"]["median"]),
                report.number(x["host_us_per_call"]),
                tables.spread(x["over_copy"]),
                "" if graph is None else report.number(x["us_per_layer"]["compress_, graph"]["median"]),
                "" if graph is None else tables.spread(graph),
            )
        )
    if not rows:
        return ""
    title = (
        "A decoding step in which every layer of llama-3.1-8b compresses 2 partitions, microseconds a layer:"
    )
    head = ("dtype", "layers", "call by call", "host, to queue one", "over copy", "in a graph", "over copy")
    return title + "\n\n" + tables.table(head, rows, left=1)


def _ragged(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for x in results:
        what = f"{x['batch']} x {tokens_text(x['tokens'])}"
        for name, times in x["contenders"].items():
            if name != COPY:
                us = report.number(1e6 * times["seconds"]["median"])
                rows.append(
                    (
                        what,
                        x["dtype"],
                        f"`{name}`",
                        us,
                        report.number(times["gb_per_s"]),
                        tables.spread(times["over_copy"]),
                    )
                )
    head = ("sequences of llama-3.1-8b", "dtype", "operator", "us", "GB/s", "over copy")
    return tables.table(head, rows, left=3) if rows else ""


def _options(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for x in results:
        for name in next(iter(x["calls"].values())):
            ratios = [tables.spread(call[name]["over_base"]) for call in x["calls"].values()]
            ms = [report.number(1e3 * call[name]["ms"]["median"]) for call in x["calls"].values()]
            cells = [cell for pair in zip(ms, ratios, strict=True) for cell in pair]
            rows.append((f"{tokens_text(x['tokens'])} {x['dtype']}", name, *cells))
    if not rows:
        return ""
    calls = [cell for call in results[0]["calls"] for cell in (f"{call}, us", "over std")]
    return tables.table(("llama-3.1-8b", "options", *calls), rows, left=2)


def _counters(problems: dict[str, Any]) -> str:
    rows = []
    for problem, launches in problems.items():
        for x in launches:
            moved = [x.get(key) for key in ("dram_bytes_read", "dram_bytes_written")]
            rows.append(
                (
                    problem,
                    f"`{x['kernel']}`",
                    _value(x.get("nanoseconds"), 1e-3),
                    *(_value(y, 1e-6) for y in moved),
                    *(_value(x.get(key)) for key in ("dram_percent", "issue_slots_percent")),
                    *(_value(x.get(key)) for key in ("occupancy_percent", "registers")),
                )
            )
    head = ("counters of Nsight Compute", "kernel", "us", "MB read", "MB written")
    more = ("memory, %", "issue slots, %", "occupancy, %", "registers")
    return tables.table((*head, *more), rows, left=2) if rows else ""


def _value(x: float | None, factor: float = 1.0) -> str:
    return "" if x is None else report.number(factor * x)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 with a message."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.card_tables", description="Tables of one folder of make gpu-check."
    )
    parser.add_argument("folder", type=Path, metavar="benchmarks/results/CARD")
    parser.add_argument("--write", type=Path, metavar="FILE", help="between the markers of this file")
    options = parser.parse_args(arguments)
    return tables.show(lambda: markdown(options.folder), options.write, (BEGIN, END))


if __name__ == "__main__":
    raise SystemExit(main())
