"""report.html, one file that needs no other, for people; report.json, the same verdict for programs."""

from __future__ import annotations

import base64
import importlib.resources
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from lagkv_ext.commands.evaluate import certify, cost, methods, pictures, recommend
from lagkv_ext.commands.evaluate.certify import CONFIDENCE, Certificates
from lagkv_ext.commands.evaluate.statistics import LEVEL, MIN_UNITS
from lagkv_ext.commands.evaluate.summary import Cell, Summary, summarise
from lagkv_ext.commands.evaluate.tasks.build import DESCRIPTIONS
from lagkv_ext.commands.evaluate.types import FULL, EvaluationError, Setting
from lagkv_ext.serving.rollout.ladder import Ladder, Rung

FORMAT = "lagkv_ext.evaluation"
VERSION = 1  # of report.json

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
    confidence: float = CONFIDENCE,
    machine: cost.Machine | None = None,
    context: int | None = None,
    batch: int | None = None,
) -> tuple[Path, recommend.Recommendation]:
    """Write ``report.html``, ``report.json``, the PNG pictures and (where a setting qualifies) ``lagkv.json`` and
    ``lagkv-ladder.json`` to ``folder``.

    Raises EvaluationError: nothing has been measured yet; a confidence or tolerance that makes no sense.
    """
    from jinja2 import Environment

    certify.check(confidence, tolerance)

    header = headers[-1]
    summary = summarise(records, seed=header["seed"])
    if "full" not in summary.cells:
        raise EvaluationError("nothing has been measured yet: there is nothing to report")
    known = certify.certificates(
        records,
        testable=recommend.deployable,
        tolerance=tolerance,
        confidence=confidence,
        seed=header["seed"],
    )
    found = recommend.recommend(summary, tolerance=tolerance, certificates=known)
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
            config=recommend.config(found.best.setting, found.about()) if found.best else "",
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
            judged=[_judged(j, known) for j in found.judged],
            certain=_certain(known),
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
    machine_readable = json.dumps(_json(header, summary, found, known), indent=1, ensure_ascii=False)
    (folder / "report.json").write_text(machine_readable + "\n", encoding="utf-8")
    configuration, rungs = folder / "lagkv.json", folder / "lagkv-ladder.json"
    if found.best:
        configuration.write_text(recommend.config(found.best.setting, found.about()), encoding="utf-8")
        rungs.write_text(_ladder(header, summary, found).text, encoding="utf-8")
    else:  # of an earlier run: they would still be taken for advice
        configuration.unlink(missing_ok=True)
        rungs.unlink(missing_ok=True)
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


def _state(j: recommend.Judgement) -> str:
    return "within" if j.passes else "worse" if "worse" in j.tasks.values() else "undecided"


def _json(
    header: dict[str, Any], summary: Summary, found: recommend.Recommendation, known: Certificates
) -> dict[str, Any]:
    """report.json. Scores and losses are in [0, 1], tolerances in points of 100."""
    best = found.best
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": header["model"],
        "started": header["started"],
        "versions": header["versions"],
        "tolerance_points": found.tolerance,
        "confidence": known.confidence,
        "verdict": found.text(),
        "recommended": None
        if best is None
        else {
            "setting": best.setting.name,
            "arguments": recommend.arguments(best.setting),
            "share_kept": best.share,
            "certificate": known.about(best.setting.name),
        },
        "settings": [
            {
                "setting": j.setting.name,
                "arguments": recommend.arguments(j.setting),
                "share_kept": j.share,
                "state": _state(j),
                "tasks": {
                    t: {
                        "verdict": verdict,
                        "score": summary.cells[j.setting.name][t].interval.mean,
                        "full_cache": summary.cells["full"][t].interval.mean,
                    }
                    for t, verdict in j.tasks.items()
                },
                "certificate": known.about(j.setting.name),
            }
            for j in found.judged
        ],
        "attempts": [x.to_json() for x in known.attempts],
    }


def _ladder(header: dict[str, Any], summary: Summary, found: recommend.Recommendation) -> Ladder:
    """Ladder file for `lagkv rollout set --ladder`."""
    rungs = []
    for j in recommend.ladder(found):
        # Tasks that hold the setting against the full cache token by token.
        compared = [c for c in summary.cells[j.setting.name].values() if "kl" in c.extra]
        agreement = fmean(c.interval.mean for c in compared) if compared else None
        kl = fmean(c.extra["kl"] for c in compared) if compared else None
        rungs.append(Rung(recommend.arguments(j.setting) or {}, min(j.share, 1.0), agreement, kl))
    return Ladder(tuple(rungs), header["model"])


def _certain(known: Certificates) -> dict[str, Any]:
    """Text of the page on the tests behind the guarantee."""
    return {
        "confidence": f"{100 * known.confidence:g}",
        "attempts": [
            {
                "prompts": x.prompts,
                "tasks": ", ".join(f"{task} {count}" for task, count in x.tasks.items()),
                "confidence": f"{100 * x.confidence:g}%",
                "tolerance": f"{x.tolerance:g}",
                "level": f"{x.level:.3g}",
                "test": "exact binomial" if x.binary else "Hoeffding-Bentkus",
                "reason": x.reason,
                "tested": [
                    {
                        "name": y.setting.name,
                        "prompts": y.prompts,
                        "loss": f"{100 * y.mean_loss:.2f}",
                        "p": f"{y.p_value:.2g}",
                        "certified": y.certified,
                    }
                    for y in x.tested
                ],
            }
            for x in known.attempts
        ],
    }


def _judged(j: recommend.Judgement, known: Certificates) -> dict[str, Any]:
    name = j.setting.name
    needed = known.needed.get(name)
    guarantee = "yes" if name in known.certified else "no" if needed is None else f"{needed:,} more prompts"
    bad = [t for t, v in j.tasks.items() if v != "ok"]
    return {
        "name": j.setting.name,
        "share": f"{100 * j.share:.0f}%",
        "state": _state(j),
        "guarantee": guarantee if name in known.certified or name in known.needed else "not tested",
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
    """Generated answers, one per task and LagKV setting, so that a reader sees what a score means."""
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
