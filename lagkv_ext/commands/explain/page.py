"""An `Explanation` as one HTML file that loads nothing: markup, style, script and data are all in it."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lagkv_ext.commands.explain.explanation import Explanation, Layer, array_json, counted

# Layers times heads times tokens up to which the page has the score and rank of every head: 3 to 4 bytes each.
MOST_VALUES = 8_000_000

# Shares of heads from none to all, from the page's background on: lightness alone tells them apart.
LIGHT = ("#ffffff", "#d6e8f7", "#86bce0", "#3182bd", "#08306b")
DARK = ("#15181c", "#17354f", "#20608f", "#4d9ed6", "#c3e4fa")
STEPS = 10


def require() -> None:
    """ImportError where a package of the page is missing: better before the model is read than after it."""
    import jinja2  # noqa: F401


def html(explanation: Explanation, *, most_values: int = MOST_VALUES) -> str:
    """The page. Above ``most_values`` scores it has those of layers (means over heads) and not those of heads."""
    from jinja2 import Environment
    from jinja2.utils import htmlsafe_json_dumps
    from markupsafe import Markup

    def dumps(data: Any, **kwargs: Any) -> str:
        return json.dumps(data, ensure_ascii=False, separators=(",", ":"), **kwargs)

    style = _file("page.css") + palette_css()
    script = _file("page.js")
    rows, columns = _settings(explanation.layers)
    # The style and the script are ours and go in as they are; everything else is escaped.
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(_file("page.html.j2"))
        .render(
            model=explanation.model,
            seen=counted(explanation.tokens_seen, "token"),
            summary=_summary(explanation),
            notes=explanation.notes(),
            rows=rows,
            columns=columns,
            reading=_reading(explanation),
            style=Markup(style),
            style_hash=_hash(style),
            script=Markup(script),
            script_hash=_hash(script),
            data=htmlsafe_json_dumps(page_data(explanation, most_values), dumps=dumps),
        )
    )


def page_data(explanation: Explanation, most_values: int = MOST_VALUES) -> dict[str, Any]:
    """Data for the page's script: `Explanation.to_json` with smaller numbers.

    ``detail``: "heads" (scores and ranks ``[H, N]``), "layers" (``[N]``: mean score, mean and best rank) or "none".
    Scores are the upper 16 bits of float32; ranks are unsigned integers, 0 where a token was never compared.
    """
    layers = explanation.layers
    values = sum(x.kept.size for x in layers)
    detail = "none" if layers[0].rank is None else "heads" if values <= most_values else "layers"
    whole = explanation.to_json()
    tokens = whole["tokens"]
    return {
        "seen": explanation.tokens_seen,
        "tokens": tokens,
        "detail": detail,
        "layers": [
            {
                "index": x.index,
                "heads": x.heads,
                "sink": x.sink,
                "window": x.window,
                "kept": array_json(x.kept),
                **_numbers(x, detail),
            }
            for x in layers
        ],
    }


def _numbers(x: Layer, detail: str) -> dict[str, Any]:
    if x.score is None or x.rank is None or x.compared is None:
        return {"score": None, "rank": None, "best": None, "compared": None, "compared_all": 0}
    rank, score, compared, best = x.rank, x.score, x.compared, None
    if detail == "layers":
        scored = rank > 0
        count = scored.sum(axis=0)
        some = np.maximum(count, 1)
        # NaN scores make the mean NaN, which is what it is.
        score = np.where(scored, score, 0).sum(axis=0) / some
        best = np.where(scored, rank, np.iinfo(np.int32).max).min(axis=0) * (count > 0)
        # At least 1 where it was compared: 0 says that it was not.
        rank = np.rint(np.where(scored, rank, 0).sum(axis=0) / some).astype(np.int32)
        compared = compared.max(axis=0)
    rivals = np.unique(compared[compared > 0])
    return {
        "score": array_json(_upper_half(np.asarray(score, dtype=np.float32))),
        "rank": array_json(_smallest(rank)),
        "best": None if best is None else array_json(_smallest(best)),
        "compared": array_json(_smallest(compared)) if rivals.size > 1 else None,
        "compared_all": int(rivals[0]) if rivals.size else 0,
    }


def _upper_half(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper 16 bits of float32, rounded to nearest: 2 to 3 digits, and the range of float32. NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _smallest(values: NDArray[Any]) -> NDArray[Any]:
    most = int(values.max(initial=0))
    return values.astype(np.uint8 if most < 1 << 8 else np.uint16 if most < 1 << 16 else np.uint32)


def _summary(explanation: Explanation) -> str:
    layers = explanation.layers
    heads = sorted({x.heads for x in layers})
    share = sum(int(x.kept.sum()) for x in layers) / sum(x.kept.size for x in layers)
    each = " or ".join(str(x) for x in heads) + (" KV head" if heads == [1] else " KV heads")
    count = len(layers)
    where = (
        f"{count} full-attention layers with {each} each"
        if count > 1
        else f"one full-attention layer with {each}"
    )
    return f"{100 * share:.1f}% of the rows kept in {where}"


def _reading(explanation: Explanation) -> str:
    if explanation.source == "saved cache":
        return "From a saved cache."
    if explanation.chunk is None:
        return "The text was read in one piece."
    return f"The text was read {explanation.chunk} tokens at a time."


def _settings(layers: Sequence[Layer]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the table of settings: layers that agree in everything share one."""
    columns = list(layers[0].settings)
    grouped: dict[str, list[Layer]] = {}
    for x in layers:
        grouped.setdefault(json.dumps([x.settings, x.compressions], sort_keys=True), []).append(x)
    rows = [
        {
            "layers": _runs([x.index for x in group]),
            "settings": [_shown(group[0].settings[name]) for name in columns],
            "compressions": group[0].compressions,
            "kept": f"{100 * sum(int(x.kept.sum()) for x in group) / sum(x.kept.size for x in group):.1f}%",
        }
        for group in grouped.values()
    ]
    return rows, columns


def _runs(numbers: Sequence[int]) -> str:
    """Ascending numbers as "0 to 3, 5"."""
    runs: list[list[int]] = []
    for x in numbers:
        if runs and x == runs[-1][-1] + 1:
            runs[-1].append(x)
        else:
            runs.append([x])
    return ", ".join(f"{x[0]} to {x[-1]}" if len(x) > 2 else ", ".join(map(str, x)) for x in runs)


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


# -- colours


def palette(anchors: Sequence[str]) -> list[tuple[str, str]]:
    """Background and text colour of every step, from none of the heads to all; text in black or white, whichever
    stands out more.
    """
    points = [_rgb(x) for x in anchors]
    found = []
    for step in range(STEPS + 1):
        at = step / STEPS * (len(points) - 1)
        low = min(int(at), len(points) - 2)
        mixed = [round(a + (at - low) * (b - a)) for a, b in zip(points[low], points[low + 1], strict=True)]
        background = "#" + "".join(f"{x:02x}" for x in mixed)
        found.append((background, max(("#000000", "#ffffff"), key=lambda x: contrast(x, background))))
    return found


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2: from 1 to 21; 4.5 is what it asks of text."""
    first, second = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (first + 0.05) / (second + 0.05)


def palette_css() -> str:
    """Classes ``k0`` to ``k10`` and their colours in both themes."""
    lines = []
    for selector, anchors, dropped in (
        (":root", LIGHT, "#66707a"),
        (':root[data-theme="dark"]', DARK, "#8a949e"),
    ):
        colours = palette(anchors)
        colours[0] = (colours[0][0], dropped)
        values = "".join(f"--k{i}: {a}; --t{i}: {b}; " for i, (a, b) in enumerate(colours))
        lines.append(f"{selector} {{ {values}}}")
    lines += [f".k{i} {{ background: var(--k{i}); color: var(--t{i}); }}" for i in range(STEPS + 1)]
    return "\n".join(lines) + "\n"


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _luminance(colour: str) -> float:
    parts = [x / 255 for x in _rgb(colour)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _file(name: str) -> str:
    return (importlib.resources.files("lagkv_ext.commands.explain") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
