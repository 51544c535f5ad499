"""The report's pictures, as PNG files: scores against rows kept, passkey heat maps, cache size."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from lagkv_ext.commands.evaluate.recommend import Recommendation
from lagkv_ext.commands.evaluate.summary import Summary
from lagkv_ext.commands.evaluate.types import Setting

# Red, blue and black are LagKV's; a reader looks for these first.
_COLOURS = {
    "lagkv-std": "#d62728",
    "lagkv-cosine": "#1f77b4",
    "lagkv-blend-smooth3-head": "#000000",
    "window": "#7f7f7f",
    "random": "#bcbd22",
    "keynorm": "#9467bd",
    "keydiff": "#2ca02c",
    "keydiff-partition": "#98df8a",
    "h2o": "#ff7f0e",
    "snapkv": "#8c564b",
}


def draw(summary: Summary, recommendation: Recommendation, folder: Path) -> list[tuple[Path, str]]:
    """Draw what the results allow; returns files and their captions."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for picture, path in ((_curves, "scores.png"), (_heatmaps, "passkey.png"), (_sizes, "cache-size.png")):
        caption = picture(summary, recommendation, folder / path)
        if caption:
            made.append((folder / path, caption))
    return made


def family(setting: Setting) -> tuple[str, int, int]:
    """Settings that differ in their ratio alone make one curve."""
    return setting.label, setting.lag_size, setting.sink_size


def _curves(summary: Summary, _: Recommendation, path: Path) -> str:
    from matplotlib import pyplot as plt

    families: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    for name in summary.compressed:
        families[family(summary.settings[name])].append(name)
    families = {k: v for k, v in families.items() if len(v) > 1}
    if not families:
        return ""
    columns = min(3, len(summary.tasks))
    lines = math.ceil(len(summary.tasks) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 3.6 * lines), squeeze=False, layout="constrained"
    )
    for axis, task in zip(axes.flat, summary.tasks, strict=False):
        full = summary.cell("full", task)
        if full is not None:
            axis.axhline(100 * full.interval.mean, color="black", lw=1, ls="--", label="full cache")
        for (label, lag, sink), names in families.items():
            cells = [c for n in names if (c := summary.cell(n, task)) is not None]
            cells.sort(key=lambda c: c.rows / c.tokens)
            if not cells:
                continue
            x = [100 * c.rows / c.tokens for c in cells]
            y = [100 * c.interval.mean for c in cells]
            low = [
                max(0.0, v - 100 * (v / 100 if c.interval.low is None else c.interval.low))
                for v, c in zip(y, cells, strict=True)
            ]
            high = [
                max(0.0, 100 * (v / 100 if c.interval.high is None else c.interval.high) - v)
                for v, c in zip(y, cells, strict=True)
            ]
            ours = label.startswith("lagkv")
            several = len({k[1:] for k in families}) > 1
            axis.errorbar(
                x,
                y,
                yerr=[low, high],
                marker="o",
                ms=4 if ours else 3,
                lw=2 if ours else 1,
                capsize=2,
                elinewidth=0.6,
                color=_COLOURS.get(label),
                alpha=1 if ours else 0.75,
                zorder=3 if ours else 2,
                label=f"{label} (L={lag}, sink={sink})" if several else label,
            )
        axis.set(title=task, xlabel="rows kept, % of tokens", ylabel="score", ylim=(-3, 103))
        axis.grid(alpha=0.25)
    for axis in list(axes.flat)[len(summary.tasks) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return (
        "Score of every method against the rows it keeps; bars are 95% bootstrap intervals, "
        "the dashed line is the full cache."
    )


def _heatmaps(summary: Summary, _: Recommendation, path: Path) -> str:
    from matplotlib import pyplot as plt

    grids: dict[str, dict[tuple[int, float], list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in summary.records:
        facts: dict[str, Any] = record["facts"]
        if record["task"] == "passkey" and "depth" in facts:
            scores = [100 * q["score"] for q in record["questions"]]
            grids[record["setting_name"]][facts["size"], facts["depth"]] += scores
    cells = grids.get("full", {})
    sizes, depths = sorted({k[0] for k in cells}), sorted({k[1] for k in cells})
    if len(depths) < 2:
        return ""
    shown = ["full"] + [
        n
        for n in grids
        if summary.settings[n].method in ("lagkv-std", "lagkv-cosine", "window")
        and not summary.settings[n].options
    ]
    shown = shown[:10]
    columns = min(4, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.3 * columns + 0.6, 2.7 * lines), squeeze=False, layout="constrained"
    )
    image = None
    for axis, name in zip(axes.flat, shown, strict=False):
        grid = [[fmean(v) if (v := grids[name].get((s, d))) else math.nan for s in sizes] for d in depths]
        image = axis.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        setting = summary.settings[name]
        axis.set_title(
            name if name == "full" else f"{setting.label}, keep {setting.keep_ratio:g}", fontsize=9
        )
        axis.set_xticks(range(len(sizes)), [str(s) for s in sizes], fontsize=8)
        axis.set_yticks(range(len(depths)), [f"{100 * d:.0f}%" for d in depths], fontsize=8)
        axis.set_xlabel("tokens", fontsize=8)
        axis.set_ylabel("depth", fontsize=8)
        for i, row in enumerate(grid):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8)
    for axis in list(axes.flat)[len(shown) :]:
        axis.axis("off")
    figure.colorbar(image, ax=axes, label="digits right, %")  # type: ignore[arg-type]
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return "Passkey retrieval by where the key is (depth) and how long the text is; share of its digits said right."


def _sizes(summary: Summary, recommendation: Recommendation, path: Path) -> str:
    from matplotlib import pyplot as plt

    judged = [
        j for j in recommendation.judged if j.setting.method != "lagkv-cache" or j is recommendation.best
    ]
    if not judged:
        return ""
    figure, axis = plt.subplots(figsize=(7.2, 0.34 * len(judged) + 1.2), layout="constrained")
    names = ["full", *(j.setting.name for j in judged)]
    colours = ["black"] + [
        "#2ca02c" if j.passes else "#d62728" if "worse" in j.tasks.values() else "#bcbd22" for j in judged
    ]
    axis.barh(names, [100, *(100 * j.share for j in judged)], color=colours)
    axis.invert_yaxis()
    axis.set_xlabel(
        "bytes of the full-attention layers, % (green: within tolerance, red: worse, yellow: undecided)",
        fontsize=8,
    )
    axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return (
        "Measured size of the compressed layers' cache over all tasks, and whether the "
        "setting stays within the tolerance."
    )
