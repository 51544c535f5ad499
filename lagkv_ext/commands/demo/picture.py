"""The picture: which tokens of the text every head kept, cache by cache, and which facts came back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lagkv_ext.commands.demo.report import megabytes
from lagkv_ext.commands.demo.run import Outcome, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")

_KEPT, _ALWAYS, _DROPPED, _FACT_DROPPED, _FACT_KEPT = "#2c6fbb", "#9fb4c9", "#f1f3f5", "#f5c8b0", "#c2410c"
_RIGHT, _WRONG = "#15803d", "#b91c1c"


def draw(result: Result, path: Path) -> None:
    """Write the picture to ``path``; its suffix (.png, .svg, .pdf) decides the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    outcomes = result.outcomes[1:]
    rows = len(result.full_layers) * result.heads
    strip = min(max(0.16 * rows, 0.5), 2.2)  # inches
    height = 2.1 + len(outcomes) * (strip + 0.62)
    # A figure of its own, not pyplot: no window system, no global state.
    figure = Figure(figsize=(15, height), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(outcomes) + 1, 1, sharex=True, squeeze=False, height_ratios=[0.4, *[strip] * len(outcomes)]
    )[:, 0]
    full = result.full
    figure.suptitle(
        f"Which tokens of the text the KV cache still holds   ({result.model_name}, "
        f"{len(result.reading.ids):,} tokens, lag_size {result.lag_size}, sink_size {result.sink_size})\n"
        f"The full cache answers {full.answers_right} of {len(result.reading.facts)} questions "
        f"with {megabytes(full.cache_bytes)} MB",
        x=0.01,
        ha="left",
        fontsize=12,
    )
    _facts_axis(axes[0], result)
    for axis, outcome in zip(axes[1:], outcomes, strict=True):
        _strip(axis, outcome, result)
    axes[-1].set_xlabel("position in the text (tokens)")
    _legend(figure)
    figure.savefig(path)


def _facts_axis(axis: Axes, result: Result) -> None:
    """Draws each fact at its position, with its answer."""
    axis.set_ylim(0, 1)
    axis.set_yticks([])
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    crowded = len(result.reading.facts) > 24
    for number, (fact, span) in enumerate(
        zip(result.reading.facts, result.reading.answer_spans, strict=True), 1
    ):
        middle = sum(span) / 2
        label = f"{number}" if crowded else f"{number}. {_shortened(fact.answer)}"
        height = (
            0.55 if number % 2 else 0.1
        )  # neighbours one above the other, so that close ones stay legible
        axis.plot([middle, middle], [0, height], color=_FACT_KEPT, linewidth=1, zorder=1)
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        axis.text(
            middle, height + 0.1, label, ha="center", fontsize=8, color=_FACT_KEPT, bbox=behind, zorder=2
        )
    axis.set_title("the facts, where their answers stand in the text", loc="left", fontsize=9)
    axis.tick_params(bottom=False)


def _strip(axis: Axes, outcome: Outcome, result: Result) -> None:
    """One cache: a row per head, a column per token, and above it whether each fact came back."""
    image = strip_image(outcome, result)
    rows, tokens = image.shape[:2]
    axis.imshow(image, aspect="auto", extent=(0, tokens, rows, 0), interpolation="antialiased")
    axis.set_ylim(rows, -0.42 * max(rows, 3) / 3)
    every = max(1, len(result.full_layers) // 8)
    shown = range(0, len(result.full_layers), every)
    axis.set_yticks(
        [(i + 0.5) * result.heads for i in shown],
        [f"layer {result.full_layers[i]}" for i in shown],
        fontsize=7,
    )
    for boundary in range(1, len(result.full_layers)):
        axis.axhline(boundary * result.heads, color="white", linewidth=1.5)
    for answer, span in zip(outcome.answers, result.reading.answer_spans, strict=True):
        style: dict[str, Any] = (
            {"marker": "o", "color": _RIGHT}
            if answer.right
            else {"marker": "x", "color": _WRONG, "linewidths": 1.8}
        )
        axis.scatter(sum(span) / 2, axis.get_ylim()[1] / 2, s=34, clip_on=False, zorder=3, **style)
    for side in ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(False)
    axis.tick_params(bottom=outcome is result.outcomes[-1])
    full = result.full
    axis.set_title(
        f"{outcome.setting.name}:  {outcome.answers_right} of {len(outcome.answers)} answers right   |   "
        f"{outcome.tokens_kept:.0f} of {outcome.tokens_seen} tokens held "
        f"({outcome.tokens_kept / outcome.tokens_seen:.0%}), of the answers' tokens "
        f"{outcome.answer_tokens_kept:.0%}   |   full-attention layers {megabytes(outcome.full_layer_bytes)} MB "
        f"instead of {megabytes(full.full_layer_bytes)} MB",
        loc="left",
        fontsize=9,
    )


def strip_image(outcome: Outcome, result: Result) -> np.ndarray:
    """float ``[layers * heads, N, 3]``: the colour of every token in every head."""
    from matplotlib.colors import to_rgb

    kept = outcome.kept.numpy()
    image = np.where(kept[..., None], to_rgb(_KEPT), to_rgb(_DROPPED))
    leading, trailing = result.always_kept
    for part in (slice(0, leading), slice(kept.shape[1] - trailing, None)):
        image[:, part] = to_rgb(_ALWAYS)
    for begin, end in result.reading.answer_spans:
        span = kept[:, begin:end, None]
        image[:, begin:end] = np.where(span, to_rgb(_FACT_KEPT), to_rgb(_FACT_DROPPED))
    return image


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(color=_KEPT, label="token kept by its score"),
        Patch(facecolor=_DROPPED, edgecolor="#c0c4c8", label="token dropped"),
        Patch(color=_ALWAYS, label="always kept (start, recent tokens)"),
        Patch(color=_FACT_KEPT, label="token of an answer, kept"),
        Patch(color=_FACT_DROPPED, label="token of an answer, dropped"),
        Line2D([], [], linestyle="", marker="o", color=_RIGHT, label="fact recalled"),
        Line2D([], [], linestyle="", marker="x", color=_WRONG, markeredgewidth=1.8, label="not recalled"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)


def _shortened(text: str, limit: int = 18) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
