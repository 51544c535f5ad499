"""Texts that come with the project, and how well a compressed cache goes on with them: prose, code, and a
letter with facts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from lagkv_ext.commands.evaluate.tasks.files import continuation_sample
from lagkv_ext.commands.evaluate.types import Question, Sample


def fidelity(
    seed: int, pieces: Callable[[str, int], list[str]], *, size: int, prompts: int, tokens: int = 64
) -> list[Sample]:
    """Continuation of windows of ``size`` tokens, in turn of the letter and of this package's source code.

    ``pieces(text, n)`` cuts a text into pieces of n tokens. Windows are spread evenly over each text; a text with room
    for few gives each once, so that there may be fewer than ``prompts``. ``seed`` is not used: there is nothing
    to draw.
    """
    from lagkv_ext.commands.demo.facts import long_letter

    texts = {"prose": long_letter()[0], "code": _code()}
    samples = []
    windows: set[tuple[str, int]] = set()
    for n in range(prompts):
        kind = ("prose", "code")[n % 2]
        units = pieces(texts[kind], 1)
        # Windows of one text overlap where the text is short; they begin at different places.
        count = (prompts + 1 - n % 2) // 2
        room = max(0, len(units) - size - tokens)
        begin = room * (n // 2) // max(1, count - 1)
        if (kind, begin) in windows:
            continue
        windows.add((kind, begin))
        context, rest = units[begin : begin + size], units[begin + size : begin + size + tokens]
        if len(rest) < tokens:
            context, rest = units[begin:-tokens], units[-tokens:]
        samples.append(
            continuation_sample(
                "fidelity",
                f"{size}-{kind}-{n}",
                "".join(context),
                "".join(rest),
                tokens,
                {"size": size, "text": kind, "language": "en"},
            )
        )
    return samples


def letter() -> list[Sample]:
    """The demo's letter with its facts, asked one by one: natural text, facts where its author put them."""
    from lagkv_ext.commands.demo.facts import long_letter

    text, facts = long_letter()
    questions = tuple(Question(f"\n\n{fact.question}", answer=f" {fact.answer}") for fact in facts)
    return [Sample("letter", "coast_road", text, questions, {"language": "en"})]


def _code() -> str:
    from lagkv_ext import formulas, ops, reference
    from lagkv_ext.commands import models

    return "\n\n".join(inspect.getsource(module) for module in (ops, formulas, reference, models))
