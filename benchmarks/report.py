"""Results as tables, comparisons of two result files, the regression guard, and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

SCHEMA = 1

# Ratio of two contenders' times -> (what it must be, the target of issue and design, in words).
TARGETS: dict[tuple[str, str], tuple[Callable[[float], bool], str]] = {
    ("compress_", "copy"): (lambda x: x <= 1.0, "at most 1.0"),
    ("compress", "clone"): (lambda x: x <= 1.0, "at most 1.0"),
    ("compiled", "compress"): (lambda x: x >= 2.5, "at least 2.5"),
    ("eager", "compress"): (lambda x: x >= 25.0, "at least 25"),
    ("compress_-portable", "compress_-avx2"): (lambda x: x <= 3.0, "at most 3"),
}
RATIOS = (
    *TARGETS,
    ("compiled", "compress_"),
    ("compiled-topk", "compress"),
    ("eager", "compress_"),
    ("kvpress", "compress"),
)
# Held by the guard against an older file: ratios, so that a slower or busier machine alone does not trip it.
GUARDED = (("compress_", "copy"), ("compress", "clone"))


class ResultsError(ValueError):
    """A result file that cannot be used; the message says why."""


def load(path: Path) -> dict[str, Any]:
    """A result file of ``benchmarks.run --json``."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ResultsError(f"{path} is no JSON: {error}") from error
    if not isinstance(results, dict) or results.get("schema") != SCHEMA or "cases" not in results:
        raise ResultsError(f"{path} is no result file of benchmarks.run (schema {SCHEMA})")
    return results


def ratio_name(pair: tuple[str, str]) -> str:
    return "/".join(pair)


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Aligned columns; the first ``left`` of them to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def case_lines(case: dict[str, Any]) -> list[str]:
    """Formats one measured case."""
    rows = [("", "ms", "quartiles", "best", "GB/s", "of copy", "turns")]
    for name, x in case["contenders"].items():
        ms = {key: 1e3 * x["seconds"][key] for key in ("median", "q1", "q3")}
        share = "" if x["copy_share"] is None else f"{100 * x['copy_share']:.0f}%"
        quartiles = f"{number(ms['q1'])} .. {number(ms['q3'])}"
        best = number(1e3 * x["seconds"]["best"])
        turns = str(x["seconds"]["count"])
        rows.append((name, number(ms["median"]), quartiles, best, number(x["gb_per_s"]), share, turns))
    lines = table(rows) if len(rows) > 1 else []
    for name, x in case["ratios"].items():
        slow, fast = name.split("/")
        goal = TARGETS.get((slow, fast))
        verdict = (
            "" if goal is None else f"   target {goal[1]}: {'met' if goal[0](x['median']) else 'MISSED'}"
        )
        spread = f"{number(x['q1'])} .. {number(x['q3'])}; best by best {number(x['of_best'])}"
        lines.append(f"{name}: {number(x['median'])}x ({spread}){verdict}")
    lines += [
        f"{name} RED, not timed: {check['difference']}"
        for name, check in case["checks"].items()
        if not check["green"]
    ]
    lines += [f"{name}: {check['note']}" for name, check in case["checks"].items() if check["note"]]
    lines += [f"{name} skipped: {reason}" for name, reason in case["skipped"].items()]
    if case.get("modelled"):
        lines += modelled_lines(case["modelled"])
    return ["  " + line for line in lines]


def modelled_lines(modelled: dict[str, Any]) -> list[str]:
    """The CUDA column on a machine without a GPU."""
    if "reason" in modelled:
        return [f"cuda: not modelled: {modelled['reason']}"]
    lines = [f"cuda, MODELLED traffic, not a time: {modelled['how']}"]
    for name, x in modelled["operators"].items():
        lines.append(
            f"cuda {name}, modelled: {x['over_least']:.3f}x the least bytes; "
            f"32-byte sectors {100 * x['sector_efficiency']:.0f}% used"
        )
    return lines


def linearity_lines(cases: Iterable[dict[str, Any]]) -> list[str]:
    """Time per token over lengths, where a group of cases differs in nothing but the length."""
    groups: dict[tuple, dict[int, dict]] = {}
    for case in cases:
        p = case["problem"]
        rest = tuple((k, v) for k, v in sorted(p.items()) if k not in ("tokens", "rows"))
        groups.setdefault((case["shape"], case["device"], case["threads"], rest), {})[p["tokens"]] = case[
            "contenders"
        ]
    lines = []
    for (shape, device, threads, rest), by_tokens in groups.items():
        for name in ("compress_", "compress"):
            points = {n: x[name]["seconds"]["median"] / n for n, x in sorted(by_tokens.items()) if name in x}
            if len(points) < 2:
                continue
            shown = ", ".join(f"{n}: {number(1e9 * t)}" for n, t in points.items())
            where = f"{device} x{threads}" if threads else device
            spread = max(points.values()) / min(points.values())
            lines.append(
                f"{name} {shape} {dict(rest)['dtype']} {where}, ns per token: {shown} (dearest/cheapest {spread:.2f})"
            )
    return lines


def regressions(new: dict[str, Any], old: dict[str, Any], tolerance: float) -> tuple[list[str], list[str]]:
    """``(lines, regressions)``: the guarded ratios of cases in both files, and those that grew beyond the tolerance.

    ResultsError where the files have no case in common, or an old guarded number has no new one beside it.
    """
    old_cases = {case["name"]: case for case in old["cases"]}
    lines, bad, common = [], [], 0
    for case in new["cases"]:
        before = old_cases.get(case["name"])
        if before is None:
            continue
        common += 1
        for pair in GUARDED:
            name = ratio_name(pair)
            if name not in before["ratios"]:
                continue
            if name not in case["ratios"]:
                bad.append(f"{case['name']}: {name} was measured before and is not now")
                continue
            a, b = before["ratios"][name]["median"], case["ratios"][name]["median"]
            line = f"{case['name']}: {name} {number(a)} -> {number(b)} ({100 * (b / a - 1):+.1f}%)"
            lines.append(line)
            if b > a * (1 + tolerance):
                bad.append(f"{line}, over the tolerance of {100 * tolerance:.0f}%")
    if not common:
        raise ResultsError("the two results have no case in common: nothing can be held against anything")
    return lines, bad


def comparison(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Medians of two result files beside each other, for every case and contender of both."""
    b_cases = {case["name"]: case for case in b["cases"]}
    rows = [("case", "", "A ms", "B ms", "B/A")]
    for case in a["cases"]:
        other = b_cases.get(case["name"], {"contenders": {}})
        for name, x in case["contenders"].items():
            if name in other["contenders"]:
                ma, mb = x["seconds"]["median"], other["contenders"][name]["seconds"]["median"]
                rows.append((case["name"], name, number(1e3 * ma), number(1e3 * mb), f"{mb / ma:.3f}"))
    if len(rows) == 1:
        raise ResultsError("the two files have no case and contender in common")
    heads = [
        f"{letter}: commit {x['commit'] or 'unknown'}, torch {x['machine']['torch']}, {x['machine']['processor']}"
        for letter, x in (("A", a), ("B", b))
    ]
    return [*heads, *table(rows, left=2)]


def plot(results: Sequence[tuple[str, dict[str, Any]]], path: Path) -> None:
    """Lines over the length where there are several lengths, bars otherwise; one panel per shape, dtype and device.

    ``results``: (label, content of a result file); labels are shown where there are several.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, dict[str, dict[int, dict]]] = {}
    for label, content in results:
        for case in content["cases"]:
            where = f"{case['device']} x{case['threads']}" if case["threads"] else case["device"]
            p = case["problem"]
            title = f"{case['shape']}, {p['dtype']}, {where}, keep {p['keep']} of {p['lag_size']}"
            for name, x in case["contenders"].items():
                key = name if len(results) == 1 else f"{name} ({label})"
                panels.setdefault(title, {}).setdefault(key, {})[p["tokens"]] = x["seconds"]
    if not panels:
        raise ResultsError("there is nothing to draw: no case has a time")
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(7 * columns, 4.2 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, series) in zip(axes.flat, panels.items(), strict=False):
        axis.set_title(title, fontsize=10)
        lengths = sorted({n for points in series.values() for n in points})
        draw = _draw_lines if len(lengths) > 1 else _draw_bars
        draw(axis, series)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_lines(axis: Any, series: dict[str, dict[int, dict]]) -> None:
    for name, points in series.items():
        tokens = sorted(points)
        middle = [1e3 * points[n]["median"] for n in tokens]
        low = [m - 1e3 * points[n]["q1"] for m, n in zip(middle, tokens, strict=True)]
        high = [1e3 * points[n]["q3"] - m for m, n in zip(middle, tokens, strict=True)]
        axis.errorbar(
            tokens, middle, yerr=[low, high], marker="o", markersize=3, capsize=2, linewidth=1.2, label=name
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens in the cache")
    axis.set_ylabel("ms per layer, median and quartiles")
    axis.grid(True, which="both", alpha=0.2)
    axis.legend(fontsize=8)


def _draw_bars(axis: Any, series: dict[str, dict[int, dict]]) -> None:
    names = list(series)[::-1]
    values = [next(iter(series[name].values())) for name in names]
    middle = [1e3 * x["median"] for x in values]
    errors = [
        [m - 1e3 * x["q1"] for m, x in zip(middle, values, strict=True)],
        [1e3 * x["q3"] - m for m, x in zip(middle, values, strict=True)],
    ]
    bars = axis.barh(names, middle, xerr=errors, capsize=2, color="#4c78a8")
    axis.bar_label(bars, labels=[f"  {number(m)}" for m in middle], fontsize=8)
    axis.set_xscale("log")
    axis.margins(x=0.15)
    tokens = next(iter(series[names[0]]))
    axis.set_xlabel(f"ms per layer at {tokens} tokens, median and quartiles (log scale)")


def number(x: float) -> str:
    """Three significant digits, without an exponent."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(x))))
    return f"{x:.{digits}f}"
