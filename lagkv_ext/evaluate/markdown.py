"""Tables in Markdown from results files: docs/quality.md is made of them, and a test holds it to them.

``python -m lagkv_ext.evaluate.markdown docs/quality.md`` rewrites what stands between ``<!-- results FILE -->`` (or
``<!-- ablation FILE -->``) and ``<!-- end -->``; paths are relative to the page.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from lagkv_ext.evaluate.storage import load
from lagkv_ext.evaluate.summary import Cell, Summary, summarise

_MARKS = {"worse": "▼", "better": "▲", "noise": "", "unknown": "?"}
_BLOCK = re.compile(r"(<!-- (results|ablation) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


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
        out.append(
            _table(summary, [("full cache", "full"), *((summary.settings[n].label, n) for n in names)])
        )
    return "\n".join(out)


def ablation(path: Path) -> str:
    """One table of all settings, with the rows that each keeps."""
    headers, records = load(path)
    summary = summarise(records, seed=headers[-1]["seed"])
    lines = [("full cache", "full")]
    for n in summary.compressed:
        s = summary.settings[n]
        label = s.label.rpartition(":")[2].replace("as_L", "rows as with L")
        lines.append((f"{label}, L={s.lag_size}, sink={s.sink_size}: {_share(summary, n)}", n))
    return _about(summary, headers) + "\n" + _table(summary, lines)


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


def _table(summary: Summary, lines: list[tuple[str, str]]) -> str:
    tasks = _finished(summary)
    kl = [t for t in tasks if "kl" in (c.extra if (c := summary.cell("full", t)) else {})]
    columns = [*tasks, *(f"{t}: KL, nats" for t in kl)]
    out = ["| method | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for label, name in lines:
        shown = [_cell(summary.cell(name, t)) for t in tasks]
        shown += ["-" if (c := summary.cell(name, t)) is None else f"{c.extra['kl']:.3f}" for t in kl]
        out.append(f"| {label} | " + " | ".join(shown) + " |")
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
    make = {"results": tables, "ablation": ablation}

    def block(match: re.Match) -> str:
        return f"{match[1]}\n{make[match[2]](page.parent / match[3])}\n{match[4]}"

    return _BLOCK.sub(block, page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(rewrite(Path(name)), encoding="utf-8")
