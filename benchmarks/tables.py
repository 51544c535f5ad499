"""``python -m benchmarks.tables benchmarks/results/NAME``: Markdown tables of what ``benchmarks.record`` measured.

``--write docs/performance.md`` puts them between the two marker lines of that file, so that no number is copied by
hand. A step without a file has no table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.cases import tokens_text
from benchmarks.fixed_cost import TARGET_US

BEGIN, END = "<!-- begin: python -m benchmarks.tables -->", "<!-- end -->"
_RATIOS = (
    ("compress_", "copy"),
    ("compress", "clone"),
    ("compiled", "compress"),
    ("compiled", "compress_"),
    ("eager", "compress"),
    ("kvpress", "compress"),
)


class TablesError(ValueError):
    """Files that make no table; the message says why."""


def markdown(folder: Path) -> str:
    """Everything that was recorded in this folder."""
    record = load(folder / "record.json")
    if record is None:
        raise TablesError(f"{folder}/record.json is missing: python -m benchmarks.record writes it")
    steps: dict[str, dict[str, Any]] = {}
    for name in record["steps"]:
        if (content := load(folder / f"{name}.json")) is not None:
            steps[name] = content
    parts = [
        _head(record, folder),
        _operators(
            [steps[name] for name in ("operators", "two-threads", "shapes", "cosine") if name in steps]
        ),
        _portable(steps.get("portable")),
        _huge_pages(steps.get("huge-pages")),
        _linear(steps.get("linear")),
        _fixed(steps.get("fixed-cost")),
        _append(steps.get("append")),
        _decode([steps[name] for name in ("decode-llama", "decode-gemma", "gemma-reads") if name in steps]),
        _prefill(steps.get("prefill")),
    ]
    return "\n\n".join(part for part in parts if part)


def write(path: Path, text: str, markers: tuple[str, str] = (BEGIN, END)) -> None:
    """Put the text between the markers of a file."""
    begin, end = markers
    content = path.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise TablesError(f"{path} must have one line '{begin}' and after it one line '{end}'")
    before, after = content.split(begin)[0], content.split(end)[1]
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def show(make: Callable[[], str], path: Path | None, markers: tuple[str, str] = (BEGIN, END)) -> int:
    """Print the tables, or put them between the markers of a file; 0, or 2 with a message."""
    try:
        text = make()
        if path is not None:
            write(path, text, markers)
        else:
            print(text)
    except (TablesError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def load(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _head(record: dict[str, Any], folder: Path) -> str:
    m = record["machine"]
    commits = sorted({step["commit"] or "unknown" for step in record["steps"].values()})
    failed = [name for name, step in record["steps"].items() if step["exit"]]
    cache = f"{m['last_level_cache_bytes'] >> 20} MB last-level cache"
    text = (
        f"{m['processor']}, {m['cores']} cores, {m['cpu_isa']}, {cache}; torch {m['torch']}, "
        f"commit {', '.join(commits)}; `python -m benchmarks.record {record['name']}`, raw numbers "
        f"in [{folder.name}](../benchmarks/results/{folder.name}). Ratios are medians of ratios within rounds "
        "(quartiles), caches cold, one layer's cache, a quarter kept of each partition of 128; **bold** misses "
        "its target."
    )
    return text + (f" Failed: {', '.join(failed)}." if failed else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def spread(x: dict[str, float]) -> str:
    return f"{report.number(x['median'])} ({report.number(x['q1'])} .. {report.number(x['q3'])})"


def ratio(case: dict[str, Any], pair: tuple[str, str]) -> str:
    x = case["ratios"].get(report.ratio_name(pair))
    if x is None:
        red = any(name in case["checks"] and not case["checks"][name]["green"] for name in pair)
        return "red" if red else ""
    goal = report.TARGETS.get(pair)
    return spread(x) if goal is None or goal[0](x["median"]) else f"**{spread(x)}**"


def _operators(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for case in (case for content in results for case in content["cases"]):
        p, times = case["problem"], case["contenders"]
        rows.append(
            (
                f"{case['shape']}, {p['heads']} x {tokens_text(p['tokens'])} x {p['key_dim']}",
                p["dtype"],
                p["score"],
                str(case["threads"]),
                *(
                    report.number(1e3 * times[x]["seconds"]["median"]) if x in times else ""
                    for x in ("compress_", "copy")
                ),
                *(ratio(case, pair) for pair in _RATIOS),
            )
        )
    if not rows:
        return ""
    targets = [report.TARGETS[pair][1] if pair in report.TARGETS else "" for pair in _RATIOS]
    head = ("layer, H x N x D", "dtype", "score", "threads", "`compress_`, ms", "copy, ms")
    return table(
        (*head, *(report.ratio_name(pair) for pair in _RATIOS)),
        [("target", *[""] * 5, *targets), *rows],
        left=4,
    )


def _portable(content: dict[str, Any] | None) -> str:
    if content is None:
        return ""
    pair = ("compress_-portable", "compress_-avx2")
    told = [f"{case['problem']['dtype']} {ratio(case, pair)}" for case in content["cases"]]
    tokens = tokens_text(content["cases"][0]["problem"]["tokens"])
    return f"Portable over AVX2 ({tokens} tokens; target {report.TARGETS[pair][1]}): {'; '.join(told)}."


def _huge_pages(content: dict[str, Any] | None) -> str:
    if content is None:
        return ""
    case = content["cases"][-1]
    pairs = (("compress", "clone"), ("compiled", "compress"), ("eager", "compress"))
    told = ", ".join(f"{report.ratio_name(pair)} {ratio(case, pair)}" for pair in pairs if ratio(case, pair))
    p = case["problem"]
    return (
        "New outputs cost page faults, of which `clone` has its own. With huge pages (`THP_MEM_ALLOC_ENABLE=1`, which "
        f"torch reads at its start) {case['shape']}, {tokens_text(p['tokens'])}, {p['dtype']}, threads "
        f"{case['threads']}: {told}."
    )


def _linear(content: dict[str, Any] | None) -> str:
    if content is None:
        return ""
    names = [x for x in ("compress_", "compress", "copy", "clone") if x in content["cases"][0]["contenders"]]
    rows = []
    for case in content["cases"]:
        tokens = case["problem"]["tokens"]
        told = [report.number(1e9 * case["contenders"][x]["seconds"]["median"] / tokens) for x in names]
        rows.append((tokens_text(tokens), *told))
    case = content["cases"][0]
    what = f"{case['shape']}, {case['problem']['dtype']}, threads {case['threads']}"
    title = f"Linear in `N`? Nanoseconds per token, {what}:"
    return title + "\n\n" + table(("tokens", *(f"`{x}`" for x in names)), rows, left=1)


def _fixed(content: dict[str, Any] | None) -> str:
    if content is None:
        return ""
    told = []
    for name, what in (("operator", "`torch.ops.lagkv.compress_`"), ("function", "`lagkv_ext.compress_`")):
        line = content["fixed_cost"][name]["fit_of_medians"]
        fixed = f"{line['fixed']:.1f}"
        told.append(f"{what} {fixed if line['fixed'] <= TARGET_US else f'**{fixed}**'}")
    d = content["decode"]
    return (
        f"Fixed cost of a call in microseconds (target at most {TARGET_US:.0f}): {', '.join(told)}. Decode: "
        f"{d['layers']} layers with {d['partitions']} partitions each take {spread(d['over_copy'])} times a copy of "
        "the same bytes."
    )


def _append(content: dict[str, Any] | None) -> str:
    if content is None:
        return ""
    told = []
    for result in content["results"]:
        caches = result["caches"]
        told += [f"{name} {x['us_per_token']['median']:.0f}" for name, x in caches.items()]
        told[-1] += f" ({tokens_text(result['tokens'])} tokens)"
    return f"Appending a token to one layer, microseconds: {', '.join(told)}."


def _decode(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for content in results:
        for result in content["results"]:
            for cache, x in result["caches"].items():
                read = x["prefill_s"]
                rows.append(
                    (
                        f"{content['model']}{', random rows' if read is None else ''}",
                        tokens_text(result["tokens"]),
                        cache,
                        str(x["rows"]),
                        f"{1e3 / x['ms_per_token']['median']:.1f}",
                        spread(x["faster"]),
                        "" if read is None else f"{read:.1f}",
                    )
                )
    if not rows:
        return ""
    head = ("decode: model", "tokens", "cache", "rows", "tokens/s", "faster than DynamicCache", "prefill, s")
    return table(head, rows, left=3)


def _prefill(content: dict[str, Any] | None) -> str:
    if content is None:
        return ""
    rows = [
        (
            name,
            tokens_text(result["tokens"]),
            *(f"{x[key] / 1e6:.0f}" for key in ("peak_bytes", "held_bytes")),
        )
        for result in content["results"]
        for name, x in result["caches"].items()
    ]
    result = content["results"][0]
    model = f"random model with {result['layers']} layers, {result['dtype']}"
    title = f"Chunked prefill, {model}, chunks of {result['chunk']}:"
    return title + "\n\n" + table(("cache", "tokens", "peak MB added", "MB held"), rows, left=2)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 with a message."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables", description="Tables of one folder of benchmarks.record."
    )
    parser.add_argument("folder", type=Path, metavar="benchmarks/results/NAME")
    parser.add_argument("--write", type=Path, metavar="FILE", help="between the markers of this file")
    options = parser.parse_args(arguments)
    return show(lambda: markdown(options.folder), options.write)


if __name__ == "__main__":
    raise SystemExit(main())
