"""Tables in Markdown from results files: docs/quality.md is made of them, and a test holds it to them.

``python -m lagkv_ext.commands.evaluate.markdown docs/quality.md`` rewrites what stands between
``<!-- results FILE -->`` and ``<!-- end -->``; paths are relative to the page. Other blocks: ``ablation FILE``, one
table of all settings; ``against METHOD FILE``, every method's difference from that one on the same questions;
``heat FILE``, scores over depth and length; ``guarantee FILE``, what its attempts certified, and the verdict.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from statistics import fmean

from lagkv_ext.commands.evaluate import certify, recommend
from lagkv_ext.commands.evaluate.statistics import Difference
from lagkv_ext.commands.evaluate.storage import load
from lagkv_ext.commands.evaluate.summary import Cell, Summary, paired, summarise

_MARKS = {"worse": "▼", "better": "▲", "noise": "", "unknown": "?"}
_BLOCK = re.compile(
    r"(<!-- (results|ablation|heat|guarantee|against (\S+)) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL
)


def tables(path: Path) -> str:
    """One table per keep_ratio: a row for each method, a column for each task."""
    headers, records = load(path)
    summary = summarise(records, seed=headers[-1]["seed"])
    out = [_about(summary, headers)]
    for ratio in sorted(
        {s.keep_ratio for s in summary.settings.values() if s.method != "full"}, reverse=True
    ):
        names = [n for n in summary.compressed if summary.settings[n].keep_ratio == ratio]
        out.append(
            f"**{1 / ratio:g}x: keep_ratio {ratio:g}** ({_share(summary, names[0])} of the rows kept)\n"
        )
        lines = [("full cache", "full"), *((_short(summary.settings[n].label), n) for n in names)]
        out.append(_table(summary, lines, rows_of=names[0]))
    return "\n".join(out)


def ablation(path: Path) -> str:
    """One table of all settings, with the rows that each keeps."""
    headers, records = load(path)
    summary = summarise(records, seed=headers[-1]["seed"])
    lines = [("full cache", "full")]
    for n in summary.compressed:
        lines.append((f"{_line(summary, n, set())}: {_share(summary, n)}", n))
    return _about(summary, headers) + "\n" + _table(summary, lines)


def against(path: Path, base: str) -> str:
    """Differences of other settings' means from those of ``base``, in points, with paired bootstrap intervals.

    ``base`` is a method, which is held against every other method at the same keep_ratio, one table for each; or the
    full name of a setting, which is held against its own method's variants.
    """
    headers, records = load(path)
    seed = headers[-1]["seed"]
    summary = summarise(records, seed=seed)
    tasks = _finished(summary)
    shapes = {(s.lag_size, s.sink_size) for n, s in summary.settings.items() if n != "full"}
    out = [_about(summary, headers)]
    for name, setting in summary.settings.items():
        if base not in (setting.method, name):
            continue
        others = [
            n
            for n in summary.compressed
            if n != name
            and summary.settings[n].keep_ratio == setting.keep_ratio
            and (base != name or summary.settings[n].method.startswith(setting.method))
        ]
        out.append(f"**keep_ratio {setting.keep_ratio:g}: points above {_line(summary, name, shapes)}**\n")
        out.append("| method | " + " | ".join(tasks) + " |\n| --- |" + " ---: |" * len(tasks))
        for n in others:
            shown = [_difference(paired(summary, n, name, t, seed=seed)) for t in tasks]
            out.append(f"| {_line(summary, n, shapes)} | " + " | ".join(shown) + " |")
        out.append("")
    if len(out) == 1:
        raise ValueError(f"{path} has no results of the method {base!r}")
    return "\n".join(out)


def _line(summary: Summary, name: str, shapes: set[tuple[int, int]]) -> str:
    """A setting's label, with what tells it from others: its sizes where there are several."""
    s = summary.settings[name]
    label = _short(s.label).replace("as_L", "rows as with L")
    return label if len(shapes) == 1 else f"{label}, L={s.lag_size}, sink={s.sink_size}"


def heat(path: Path) -> str:
    """One table per task and setting: a row for each depth, a column for each length."""
    headers, records = load(path)
    summary = summarise(records, seed=headers[-1]["seed"])
    out = [_about(summary, headers)]
    for task in _finished(summary):
        for name in summary.settings:
            cells: dict[tuple[float, int], list[float]] = {}
            for x in summary.records:
                if x["task"] == task and x["setting_name"] == name and "depth" in x["facts"]:
                    place = float(x["facts"]["depth"]), int(x["facts"]["size"])
                    cells.setdefault(place, []).extend(float(q["score"]) for q in x["questions"])
            depths, sizes = sorted({d for d, _ in cells}), sorted({n for _, n in cells})
            out.append(f"**{task}, {'full cache' if name == 'full' else name}**\n")
            out.append("| depth | " + " | ".join(f"{n} tokens" for n in sizes) + " |")
            out.append("| --- |" + " ---: |" * len(sizes))
            for depth in depths:
                means = [
                    f"{100 * fmean(found):.0f}" if (found := cells.get((depth, n))) else "-" for n in sizes
                ]
                out.append(f"| {depth:.0%} | " + " | ".join(means) + " |")
            out.append("")
    return "\n".join(out)


def guarantee(path: Path) -> str:
    """One table of the settings tested in each attempt, and the verdict that the command gave."""
    headers, records = load(path)
    seed, plan = headers[-1]["seed"], headers[-1]["plan"]
    tolerance, confidence = plan["tolerance"], plan.get("confidence", certify.CONFIDENCE)
    summary = summarise(records, seed=seed)
    known = certify.certificates(
        records, testable=recommend.deployable, tolerance=tolerance, confidence=confidence, seed=seed
    )
    out = [_about(summary, headers)]
    for number, x in enumerate(known.attempts, 1):
        out.append(
            f"**Attempt {number}: {x.prompts} prompts, {x.tolerance:g} points, {100 * x.confidence:g}%**\n"
        )
        out.append(
            "| setting | rows kept | mean loss, points | p-value | certified | new prompts that would decide |"
        )
        out.append("| --- | ---: | ---: | ---: | --- | ---: |")
        for y in x.tested:
            name = y.setting.name
            needed = known.needed.get(name)
            more = "" if name in known.certified else "none would" if needed is None else f"{needed:,}"
            out.append(
                f"| {name} | {_share(summary, name)} | {100 * y.mean_loss:.2f} | {y.p_value:.3f} | "
                f"{'yes' if y.certified else 'no'} | {more} |"
            )
        out.append("")
    found = recommend.recommend(summary, tolerance=tolerance, certificates=known)
    return "\n".join([*out, f"The verdict: {found.text()}\n"])


def _difference(found: Difference | None) -> str:
    if found is None:
        return "-"
    x = found.interval
    spread = "" if x.low is None or x.high is None else f" ({_signed(x.low)} to {_signed(x.high)})"
    mark = _MARKS[found.verdict]
    return f"{_signed(x.mean)}{spread}{' ' + mark if mark else ''}"


def _signed(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}"  # + 0.0: never -0.0


def _short(label: str) -> str:
    """A user's ``module:function`` by the function's name."""
    return label.rpartition(":")[2]


def _about(summary: Summary, headers: list[dict]) -> str:
    x = headers[-1]
    sizes = [
        f"{t} {c.interval.prompts}x{c.interval.questions // c.interval.prompts} ({c.tokens:.0f} tokens)"
        for t in _finished(summary)
        if (c := summary.cell("full", t)) is not None
    ]
    v = x["versions"]
    left = [t for t in summary.tasks if t not in _finished(summary)]
    unfinished = f" Unfinished, and not shown: {', '.join(left)}." if left else ""
    cpu = sum(r.get("cpu_seconds", 0.0) for r in summary.records) / 60
    spent = f" {len(summary.records)} measurements, {cpu:.1f} minutes of processor time."
    silent = [t for t in summary.silent() if t not in left]
    note = f" Hardly better than guessing with the full cache: {', '.join(silent)}." if silent else ""
    return (
        f"{x['model']}, {x['dtype']}, torch {v['torch']}, transformers {v['transformers']}, seed {x['seed']}. "
        f"Prompts x questions: {', '.join(sizes)}.{note}{unfinished}{spent}\n"
    )


def _finished(summary: Summary) -> list[str]:
    """Tasks that every setting was measured on with as many prompts as the full cache, or was not possible
    on at all.
    """
    out = []
    for task in summary.tasks:
        counts = {c.interval.prompts for n in summary.settings if (c := summary.cell(n, task)) is not None}
        if len(counts) == 1:
            out.append(task)
    return out


def _share(summary: Summary, name: str) -> str:
    cells = list(summary.cells[name].values())
    return f"{100 * sum(c.rows for c in cells) / sum(c.tokens for c in cells):.0f}%"


def _table(summary: Summary, lines: list[tuple[str, str]], rows_of: str | None = None) -> str:
    """A row for each setting, a column for each task, and their mean over the tasks that tell something.

    ``rows_of``: a setting whose share of rows kept gets a row of its own, as the bound for what cannot be compressed.
    """
    tasks = _finished(summary)
    heard = [t for t in tasks if t not in summary.silent()]
    kl = [t for t in tasks if "kl" in (c.extra if (c := summary.cell("full", t)) else {})]
    columns = [*tasks, "mean", *(f"{t}: KL, nats" for t in kl)]
    out = ["| method | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for label, name in lines:
        found = [c for t in heard if (c := summary.cell(name, t)) is not None]
        mean = f"{100 * fmean(c.interval.mean for c in found):.1f}" if len(found) == len(heard) > 0 else "-"
        shown = [*(_cell(summary.cell(name, t)) for t in tasks), mean]
        shown += ["-" if (c := summary.cell(name, t)) is None else f"{c.extra['kl']:.3f}" for t in kl]
        out.append(f"| {label} | " + " | ".join(shown) + " |")
    if rows_of is not None:
        cells = [summary.cell(rows_of, t) for t in tasks]
        shares = ["-" if c is None else f"{100 * c.rows / c.tokens:.0f}" for c in cells]
        out.append("| *rows kept, %* | " + " | ".join([*shares, *[""] * (1 + len(kl))]) + " |")
    return "\n".join(out) + "\n"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    x = cell.interval
    spread = "" if x.low is None or x.high is None else f" ({100 * x.low:.0f} to {100 * x.high:.0f})"
    mark = "" if cell.loss is None else _MARKS[cell.loss.verdict]
    return f"{100 * x.mean:.1f}{spread}{' ' + mark if mark else ''}"


def rewrite(page: Path) -> str:
    """The page's text with its tables made anew from their results files."""
    make = {"results": tables, "ablation": ablation, "heat": heat, "guarantee": guarantee}

    def block(match: re.Match) -> str:
        path = page.parent / match[4]
        text = against(path, match[3]) if match[3] else make[match[2]](path)
        return f"{match[1]}\n{text}\n{match[5]}"

    return _BLOCK.sub(block, page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(rewrite(Path(name)), encoding="utf-8")
