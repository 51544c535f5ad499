"""Prints and writes the demo's results: the table, sentences that explain it, and the raw numbers."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch

from lagkv_ext.commands.demo.run import Outcome, Result

if TYPE_CHECKING:
    from rich.table import Table


def table(result: Result) -> Table:
    """One row per cache; fits 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    out = Table(
        title=f"{result.model_name}, {result.dtype} on {result.device}, {result.threads} CPU threads, "
        f"lag_size {result.lag_size}, sink_size {result.sink_size}",
        caption=f"times: readings {result.rounds}, decoding steps {len(result.full.step_s)} per cache, medians; "
        f"full-att.: the {len(result.full_layers)} full-attention layers of {result.layer_count}",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    out.add_column("cache", no_wrap=True)
    for head in (
        "tokens\nheld/seen",
        "full-\natt.\nMB",
        "all\nlayers\nMB",
        "saved\nMB",
        "first\ntoken\ns",
        "decode\ntokens\n/s",
        f"answers\nright\nof {len(result.reading.facts)}",
        "answer\ntokens\nright",
        "answer\ntokens\nheld",
    ):
        out.add_column(head, justify="right", no_wrap=True)
    for number, outcome in enumerate(result.outcomes):
        following = result.outcomes[number + 1 : number + 2]
        out.add_row(
            *_cells(outcome, result),
            end_section=any(o.setting.ratio != outcome.setting.ratio for o in following),
        )
    return out


def _cells(outcome: Outcome, result: Result) -> list[str]:
    return [
        outcome.setting.name,
        f"{outcome.tokens_kept:.0f}/{outcome.tokens_seen}",
        megabytes(outcome.full_layer_bytes),
        megabytes(outcome.cache_bytes),
        megabytes(result.full.cache_bytes - outcome.cache_bytes),
        f"{outcome.median_first_token_s:.2f}",
        f"{outcome.decode_tokens_per_s:.1f}",
        f"{outcome.answers_right}",
        f"{outcome.answer_tokens_right:.0%}",
        f"{outcome.answer_tokens_kept:.0%}",
    ]


def explanation(result: Result) -> list[str]:
    """Explains the numbers, one or two sentences per subject. Every word that depends on a number is chosen by it."""
    return [*_quality(result), _memory(result), _speed(result)]


def _quality(result: Result) -> list[str]:
    facts, full = len(result.reading.facts), result.full
    layers, kept = len(result.full_layers), result.layer_count
    reach = (
        f"in all {kept} layers"
        if layers == kept
        else f"in {layers} of {kept} layers, and only these are compressed"
    )
    lines = [
        f"The model itself: with the full cache it gets {full.answers_right} of {facts} facts right. It has full "
        f"attention {reach}."
    ]
    if not full.answers_right:
        lines.append(
            "So its other answers say nothing about compression: ask easier facts, or a larger model."
        )
        return lines
    for ratio in sorted({outcome.setting.ratio for outcome in result.outcomes[1:]}):
        group = [outcome for outcome in result.outcomes[1:] if outcome.setting.ratio == ratio]
        group.sort(key=lambda o: (o.answers_right, o.answer_tokens_right), reverse=True)
        parts = [
            f"{o.setting.score} holds {o.answer_tokens_kept:.0%}, gets {o.answers_right} of {facts} right, and "
            f"{o.answer_tokens_right:.0%} of the tokens when shown the ones before"
            for o in group
        ]
        lines.append(
            f"{ratio:g}x (tokens chosen at random would hold {group[0].answer_tokens_by_chance:.0%} of the answers): "
            + "; ".join(parts)
            + "."
        )
        lines.append(_survivors(result, group, f"{ratio:g}x"))
    blind = [o.setting.name for o in result.outcomes[1:] if o.answer_tokens_kept <= o.answer_tokens_by_chance]
    if blind:
        lines.append(f"No better than chance at holding what was asked for: {', '.join(blind)}.")
    return lines


def _survivors(result: Result, group: list[Outcome], ratio: str) -> str:
    """The facts that a ratio keeps and those that it costs, named."""
    known = [n for n, answer in enumerate(result.full.answers) if answer.right]
    safe = [n for n in known if all(o.answers[n].right for o in group)]
    lost = [n for n in known if not any(o.answers[n].right for o in group)]
    some = [n for n in known if n not in safe and n not in lost]
    parts = [
        f"{words}: " + ", ".join(result.reading.facts[n].answer for n in facts)
        for words, facts in (("right with every score", safe), ("with some", some), ("lost with all", lost))
        if facts
    ]
    return f"{ratio}, of the facts that the full cache gets right: " + "; ".join(parts) + "."


def _held_share(outcome: Outcome) -> float:
    return outcome.tokens_kept / outcome.tokens_seen


def _memory(result: Result) -> str:
    full, smallest = result.full, min(result.outcomes, key=lambda o: o.cache_bytes)
    sink, recent = result.always_kept
    layers = (megabytes(full.full_layer_bytes), megabytes(smallest.full_layer_bytes))
    whole = (megabytes(full.cache_bytes), megabytes(smallest.cache_bytes))
    text = (
        f"Memory: a ratio holds for the middle of the text only; the first {sink} and the last {recent} tokens stay, "
        f"so {smallest.setting.name} keeps {_held_share(smallest):.0%} of this text, and less of a longer one. Its "
        f"full-attention layers shrink from {layers[0]} to {layers[1]} MB (room for the next tokens included), the "
        f"whole cache from {whole[0]} to {whole[1]} MB"
    )
    others = result.layer_count - len(result.full_layers)
    if others:
        untouched = megabytes(full.cache_bytes - full.full_layer_bytes)
        text += f": {others} of {result.layer_count} layers do not grow with the text, and their {untouched} MB stay"
    return text + "."


def _speed(result: Result) -> str:
    full, rest = result.full, result.outcomes[1:]
    change = [o.decode_tokens_per_s / full.decode_tokens_per_s - 1 for o in rest]
    first = [o.median_first_token_s / full.median_first_token_s - 1 for o in rest]
    text = (
        f"Speed: against the full cache, decoding changes by {min(change):+.0%} to {max(change):+.0%} and the time to "
        f"the first token by {min(first):+.0%} to {max(first):+.0%}"
    )
    if result.rounds > 1:
        spread = max(
            (max(o.first_token_s) - min(o.first_token_s)) / o.median_first_token_s for o in result.outcomes
        )
        text += f" (the same reading repeated differs by up to {spread:.0%} on this machine)"
    share = full.full_layer_bytes / (full.cache_bytes + result.weight_bytes)
    text += (
        f". A decoding step reads up to {megabytes(result.weight_bytes)} MB of weights and "
        f"{megabytes(full.cache_bytes)} MB of full cache, of which compression can touch about {share:.0%}"
    )
    return text + (": it pays in speed where the cache outweighs the model." if share < 0.5 else ".")


def answers(result: Result) -> Table:
    """A row per question, a column per cache: whether it was answered right."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    out = Table(title="answers", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    out.add_column("the text says")
    for outcome in result.outcomes:
        out.add_column(outcome.setting.name.replace(" ", "\n"), justify="center", no_wrap=True)
    for number, fact in enumerate(result.reading.facts):
        right = [outcome.answers[number].right for outcome in result.outcomes]
        out.add_row(
            escape(f"{number + 1}. {fact.sentence}"), *("[green]yes" if r else "[red]no" for r in right)
        )
    return out


def to_dict(result: Result) -> dict[str, Any]:
    """Everything measured, as plain values for JSON. Bytes are bytes, times are seconds, kept positions per head."""
    import transformers

    from lagkv_ext import __version__

    return {
        "model": result.model_name,
        "dtype": result.dtype,
        "device": result.device,
        "threads": result.threads,
        "lag_size": result.lag_size,
        "sink_size": result.sink_size,
        "layers": result.layer_count,
        "full_attention_layers": result.full_layers,
        "kv_heads": result.heads,
        "weight_bytes": result.weight_bytes,
        "text_tokens": len(result.reading.ids),
        "always_kept": {"leading": result.always_kept[0], "trailing": result.always_kept[1]},
        "rounds": result.rounds,
        "seconds": result.seconds,
        "versions": {
            "lagkv_ext": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "facts": [
            {
                "question": fact.question,
                "answer": fact.answer,
                "sentence_tokens": sentence,
                "answer_tokens": answer,
            }
            for fact, sentence, answer in zip(
                result.reading.facts, result.reading.sentence_spans, result.reading.answer_spans, strict=True
            )
        ],
        "caches": [_outcome_dict(outcome, result) for outcome in result.outcomes],
    }


def _outcome_dict(outcome: Outcome, result: Result) -> dict[str, Any]:
    return {
        "name": outcome.setting.name,
        "score": outcome.setting.score,
        "ratio": outcome.setting.ratio,
        "keep_ratio": outcome.setting.keep_ratio,
        "tokens_seen": outcome.tokens_seen,
        "tokens_kept": outcome.tokens_kept,
        "full_attention_bytes": outcome.full_layer_bytes,
        "cache_bytes": outcome.cache_bytes,
        "bytes_saved": result.full.cache_bytes - outcome.cache_bytes,
        "compressions": outcome.compressions,
        "kept_hash": outcome.kept_hash,
        "first_token_s": outcome.first_token_s,
        "decode_step_s": outcome.step_s,
        "answers_right": outcome.answers_right,
        "answer_tokens_right": outcome.answer_tokens_right,
        "answer_tokens_kept": outcome.answer_tokens_kept,
        "answer_tokens_by_chance": outcome.answer_tokens_by_chance,
        "answers": [
            {"said": a.said, "right": a.right, "tokens_right": a.tokens_right, "tokens": a.tokens}
            for a in outcome.answers
        ],
        "kept_positions": [row.nonzero()[:, 0].tolist() for row in outcome.kept],
    }


def megabytes(count: float) -> str:
    """Three digits that count: 1,072 and 12.4 and 0.0312."""
    value = count / 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
