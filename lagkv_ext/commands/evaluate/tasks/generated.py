"""Facts in text that the model writes itself: what a cache meets in long decoding."""

from __future__ import annotations

import random
from typing import Any

import torch

from lagkv_ext.cache.fidelity import forward
from lagkv_ext.commands.evaluate.tasks.prose import LANGUAGES, sentences
from lagkv_ext.commands.evaluate.tasks.synthetic import digits
from lagkv_ext.commands.evaluate.types import EvaluationError, Question, Sample

_TEMPERATURE = 0.8


def written_facts(
    seed: int, counter: Any, size: int, prompts: int, arguments: dict[str, Any]
) -> list[Sample]:
    """The model goes on with a few sentences of prose until there are ``size`` tokens. From time to time a sentence
    "The secret code of CITY is 12345." is inserted; these are asked for, as in the task facts.

    All prompts are written at once. What is drawn depends on the model, on ``seed`` and on rounding.
    """
    count, model, tokenizer = int(arguments.get("facts", 3)), counter.model, counter.tokenizer
    if model is None:
        raise EvaluationError("the task facts-written needs the model that writes the text")
    tongue = LANGUAGES["en"]
    begins, stated = [], []
    for n in range(prompts):
        rng = random.Random(f"written {seed} {size} {n}")
        prose = sentences(random.Random(f"prose {seed} written {n}"))
        begins.append(tokenizer(" ".join(next(prose) for _ in range(3)))["input_ids"])
        places = rng.sample(tongue.places, count)
        stated.append([(tongue.fact.format(place=p), tongue.gap + digits(rng, 5)) for p in places])
    facts = [
        [tokenizer(f" {fact}{code}.", add_special_tokens=False)["input_ids"] for fact, code in own]
        for own in stated
    ]
    texts = _write(model, begins, facts, size, seed, _banned(tokenizer))
    return [
        Sample(
            "facts-written",
            f"{size}-{n}",
            tokenizer.decode(text, skip_special_tokens=True),
            tuple(Question(f"\n\n{fact}", answer=code) for fact, code in stated[n]),
            {"size": size, "language": "en"},
        )
        for n, text in enumerate(texts)
    ]


def _write(
    model: Any, begins: list[list[int]], facts: list[list[list[int]]], size: int, seed: int, banned: list[int]
) -> list[list[int]]:
    """Token by token: a text's given tokens first, then what the model draws, with each fact begun at its place."""
    from transformers import DynamicCache

    texts: list[list[int]] = [[] for _ in begins]
    # Spread over the first nine tenths, as in the task facts; a fact waits for the one before it to end.
    places = [int(size * 0.9 * (i + 0.5) / len(facts[0])) for i in range(len(facts[0]))]
    given = [list(x) for x in begins]
    generator = torch.Generator(device=model.device).manual_seed(seed)
    cache, logits = DynamicCache(config=model.config), None
    with torch.inference_mode():
        for position in range(size):
            drawn = [0] * len(texts)
            if logits is not None:
                logits[:, banned] = float("-inf")
                chances = torch.softmax(logits.float() / _TEMPERATURE, dim=-1)
                drawn = torch.multinomial(chances, 1, generator=generator)[:, 0].tolist()
            for n, text in enumerate(texts):
                if position in places:
                    given[n] += facts[n][places.index(position)]
                text.append(given[n].pop(0) if given[n] else drawn[n])
            ids = torch.tensor([[text[-1]] for text in texts], device=model.device)
            logits = forward(model, ids, cache, position=position, logits_to_keep=1)[:, -1]
    return texts


def _banned(tokenizer: Any) -> list[int]:
    """Tokens that would end the text."""
    return sorted(set(tokenizer.all_special_ids))
