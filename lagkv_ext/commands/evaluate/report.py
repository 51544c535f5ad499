"""report.html: one file that needs no other, for who decides and for who has to believe it."""

from __future__ import annotations

import base64
import importlib.resources
import json
from pathlib import Path
from typing import Any

from lagkv_ext.commands.evaluate import cost, methods, pictures, recommend
from lagkv_ext.commands.evaluate.statistics import LEVEL, MIN_UNITS
from lagkv_ext.commands.evaluate.summary import Cell, Summary, summarise
from lagkv_ext.commands.evaluate.tasks.build import DESCRIPTIONS
from lagkv_ext.commands.evaluate.types import FULL, EvaluationError, Setting

_CLASSES = {"worse": "worse", "better": "better", "noise": "noise", "unknown": "unknown"}


def require() -> None:
    """ImportError where a package of the report is missing: better before the run than after it."""
    import jinja2  # noqa: F401
    import matplotlib  # noqa: F401


def write_report(
    headers: list[dict[str, Any]],
    records: list[dict[str, Any]],
    folder: Path,
    *,
    tolerance: float = recommend.TOLERANCE,
    machine: cost.Machine | None = None,
    context: int | None = None,
    batch: int | None = None,
) -> tuple[Path, recommend.Recommendation]:
    """Write ``report.html``, the PNG pictures and (where a setting qualifies) ``lagkv.json`` to ``folder``.

    Raises EvaluationError: nothing has been measured yet.
    """
    from jinja2 import Environment

    header = headers[-1]
    summary = summarise(records, seed=header["seed"])
    if "full" not in summary.cells:
        raise EvaluationError("nothing has been measured yet: there is nothing to report")
    found = recommend.recommend(summary, tolerance=tolerance)
    drawn = pictures.draw(summary, found, folder)
    page = (importlib.resources.files("lagkv_ext.commands.evaluate") / "report.html.j2").read_text(
        encoding="utf-8"
    )
    # Answers and file names come from outside: everything is escaped.
    html = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(page)
        .render(
            header=header,
            command=header.get("command", ""),
            summary=summary,
            found=found,
            verdict=found.text(),
            line=recommend.line(found.best.setting) if found.best else "",
            config=recommend.config(found.best.setting) if found.best else "",
            images=[
                ("data:image/png;base64," + base64.b64encode(p.read_bytes()).decode(), c) for p, c in drawn
            ],
            tables=[
                _table(summary, ratio)
                for ratio in sorted({s.keep_ratio for s in summary.settings.values()}, reverse=True)
                if ratio < 1
            ],
            full=[_shown(summary.cell("full", t)) for t in summary.tasks],
            tasks=[(t, DESCRIPTIONS.get(t, ""), _samples(summary, t)) for t in summary.tasks],
            silent=summary.silent(),
            spent=_spent(summary),
            methods=[(m, methods.description(m)) for m in _methods(summary)],
            costs=_costs(header, summary, found, machine or cost.Machine(), context, batch),
            judged=[_judged(j) for j in found.judged],
            examples=_examples(summary),
            level=round(100 * LEVEL),
            least=MIN_UNITS,
            tolerance=tolerance,
            versions=header["versions"],
            raw=json.dumps({k: v for k, v in header.items() if k != "kind"}, indent=1, ensure_ascii=False),
        )
    )
    path = folder / "report.html"
    path.write_text(html, encoding="utf-8")
    configuration = folder / "lagkv.json"
    if found.best:
        configuration.write_text(recommend.config(found.best.setting), encoding="utf-8")
    else:
        configuration.unlink(missing_ok=True)  # of an earlier run: it would still be taken for advice
    return path, found


def _table(summary: Summary, ratio: float) -> dict[str, Any]:
    """All settings with this keep_ratio: a row each, a cell per task."""
    names = [n for n in summary.compressed if summary.settings[n].keep_ratio == ratio]
    several = len({(summary.settings[n].lag_size, summary.settings[n].sink_size) for n in names}) > 1
    body = []
    for name in names:
        setting = summary.settings[name]
        label = (
            f"{setting.label}, L={setting.lag_size}, sink={setting.sink_size}" if several else setting.label
        )
        cells = [_shown(summary.cell(name, t)) for t in summary.tasks]
        present = list(summary.cells[name].values())
        share = sum(c.rows for c in present) / sum(c.tokens for c in present)
        body.append(
            {
                "label": label,
                "cells": cells,
                "share": f"{100 * share:.0f}%",
                "ours": setting.method.startswith("lagkv"),
            }
        )
    return {"ratio": f"{ratio:g}", "factor": f"{1 / ratio:g}", "body": body}


def _shown(cell: Cell | None) -> dict[str, str]:
    if cell is None:
        return {"text": "-", "class": "", "title": "not measured: see what was left out"}
    x = cell.interval
    spread = "" if x.low is None or x.high is None else f"{100 * x.low:.1f} to {100 * x.high:.1f}, "
    title = f"{spread}{x.prompts} prompts, {x.questions} questions; drawn: {x.unit}s"
    title += "".join(f"; {k} {v:.3f}" for k, v in cell.extra.items())
    if cell.loss is None:
        return {"text": f"{100 * x.mean:.1f}", "class": "", "title": title}
    d = cell.loss.interval
    verdict = cell.loss.verdict
    ends = "" if d.low is None or d.high is None else f" ({100 * d.low:+.1f} to {100 * d.high:+.1f})"
    title = f"against the full cache {100 * d.mean:+.1f}{ends}: {verdict}. {title}"
    return {"text": f"{100 * x.mean:.1f}", "class": _CLASSES[verdict], "title": title}


def _samples(summary: Summary, task: str) -> str:
    cell = summary.cell("full", task)
    if cell is None:
        return ""
    guess = f"; guessing gives {100 * cell.extra['chance']:.0f}" if "chance" in cell.extra else ""
    x = cell.interval
    return f"{x.prompts} prompts, {x.questions} questions, {cell.tokens:.0f} tokens on average{guess}"


def _spent(summary: Summary) -> str:
    clock, cpu = (sum(x[k] for x in summary.records) / 60 for k in ("seconds", "cpu_seconds"))
    return f"{len(summary.records)} measurements in {clock:.1f} minutes ({cpu:.1f} minutes of processor time)"


def _methods(summary: Summary) -> list[str]:
    return list(dict.fromkeys(s.method for s in summary.settings.values()))


def _judged(j: recommend.Judgement) -> dict[str, Any]:
    state = "within" if j.passes else "worse" if "worse" in j.tasks.values() else "undecided"
    bad = [t for t, v in j.tasks.items() if v != "ok"]
    return {
        "name": j.setting.name,
        "share": f"{100 * j.share:.0f}%",
        "state": state,
        "bad": ", ".join(bad),
        "worst": f"{j.worst[0]} ({j.worst[1]:.1f})",
        "excluded": f"{max(0.0, j.excluded):.1f}",
    }


def _costs(
    header: dict[str, Any],
    summary: Summary,
    found: recommend.Recommendation,
    machine: cost.Machine,
    context: int | None,
    batch: int | None,
) -> dict[str, Any]:
    shape = cost.Shape.from_header(header["shape"])
    tokens = context or 32768
    chosen = [FULL, *(Setting("lagkv", r) for r in (0.5, 0.25, 0.125))]
    if found.best is not None:
        chosen.append(found.best.setting)
    body = []
    reference = cost.cost(shape, FULL, context=tokens, machine=machine, batch=batch)
    for setting in chosen:
        c = cost.cost(shape, setting, context=tokens, machine=machine, batch=batch)
        name = "full cache" if setting == FULL else f"keep_ratio {setting.keep_ratio:g}, L={setting.lag_size}"
        if found.best is not None and setting is found.best.setting:
            name += " (recommended)"
        body.append(
            {
                "name": name,
                "rows": f"{c.rows:,}",
                "mb": f"{c.cache_bytes / 1e6:,.1f}",
                "factor": f"{reference.cache_bytes / c.cache_bytes:.2f}x",
                "sequences": f"{c.sequences:,}",
                "speed": f"{c.tokens_per_s:,.0f}",
                "price": f"{c.per_million:.4f}" if c.per_million is not None else "",
            }
        )
    return {
        "body": body,
        "context": f"{tokens:,}",
        "formulas": cost.FORMULAS,
        "shape": header["shape"],
        "machine": machine,
        "check": cost.check(shape, summary.records),
        "priced": machine.price is not None,
        "row_bytes": shape.row_bytes,
    }


def _examples(summary: Summary) -> list[dict[str, str]]:
    """What was said, once per task and LagKV setting, so that a reader sees what a score means."""
    out: list[dict[str, str]] = []
    for task in summary.tasks:
        first = next(x["sample"] for x in summary.records if x["task"] == task)
        for record in summary.records:
            if record["task"] == task and record["sample"] == first and len(out) < 200:
                setting = Setting.from_json(record["setting"])
                question = record["questions"][0]
                if (
                    setting.method in ("full", "lagkv-std", "lagkv-cosine") and not setting.options
                ) and "said" in question:
                    out.append(
                        {
                            "task": task,
                            "setting": setting.name,
                            "asked": question["asked"],
                            "wanted": question["wanted"],
                            "said": question["said"],
                            "score": f"{100 * question['score']:.0f}",
                        }
                    )
    return out
