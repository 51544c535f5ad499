"""The text that the model reads, the facts it is asked for, and where in the text their tokens are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lagkv_ext.user_files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DemoError(Exception):
    """An input the demo cannot work with; the message says which and why."""


@dataclass(frozen=True)
class Fact:
    """The text says ``question`` and then ``answer``; given ``question``, the model has to go on with ``answer``."""

    question: str
    answer: str

    @property
    def sentence(self) -> str:
        return f"{self.question} {self.answer}"


@dataclass(frozen=True)
class Reading:
    """A text as the model reads it. Spans are half-open ranges of token positions, one per fact."""

    ids: list[int]
    facts: tuple[Fact, ...]
    sentence_spans: tuple[tuple[int, int], ...]
    answer_spans: tuple[tuple[int, int], ...]


def short_letter() -> tuple[str, tuple[Fact, ...]]:
    """The demo's own text: about 1,000 tokens with 7 facts, all of which SmolLM2 135M answers with its full cache."""
    return _packaged("short_letter")


def long_letter() -> tuple[str, tuple[Fact, ...]]:
    """The letter in full: about 2,000 tokens with 12 facts, many of them alike."""
    return _packaged("coast_road")


def _packaged(name: str) -> tuple[str, tuple[Fact, ...]]:
    data = files("lagkv_ext.commands.demo") / "data"
    text = (data / f"{name}.txt").read_text(encoding="utf-8")
    return text, parse_facts((data / f"{name}.json").read_text(encoding="utf-8"), f"{name}.json")


def read_files(text_file: Path, facts_file: Path) -> tuple[str, tuple[Fact, ...]]:
    """Text and facts of the user; raises DemoError for what cannot be read."""
    try:
        text = read_text(text_file, str(text_file))
        facts = read_text(facts_file, str(facts_file))
    except (OSError, ValueError) as error:
        raise DemoError(f"cannot read the text or its facts: {error}") from error
    return text, parse_facts(facts, str(facts_file))


def parse_facts(source: str, name: str) -> tuple[Fact, ...]:
    """Facts from JSON: a list of ``{"question": "The code of the gate is", "answer": "40817"}``."""
    form = 'a JSON list of {"question": "The code of the gate is", "answer": "40817"}'
    try:
        entries: Any = json.loads(source)
    except json.JSONDecodeError as error:
        raise DemoError(f"{name} must be {form}, got no JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise DemoError(f"{name} must be {form}, got {type(entries).__name__} of length 0 or no list at all")
    facts = []
    for number, entry in enumerate(entries, 1):
        fields = entry if isinstance(entry, dict) else {}
        question, answer = (str(fields.get(name) or "").strip() for name in ("question", "answer"))
        if not question or not answer:
            raise DemoError(
                f"fact {number} of {name} must have a question and an answer, got {json.dumps(entry)}"
            )
        facts.append(Fact(question, answer))
    return tuple(facts)


def read(text: str, facts: tuple[Fact, ...], tokenizer: PreTrainedTokenizerBase) -> Reading:
    """Tokenise the text and find every fact in it; raises DemoError for a fact that the text does not state."""
    encoding = tokenizer(text, return_offsets_mapping=True)
    offsets = encoding["offset_mapping"]
    sentences, answers = [], []
    for number, fact in enumerate(facts, 1):
        begin = text.find(fact.sentence)
        if begin < 0:
            raise DemoError(f"the text does not state fact {number}, word for word: {fact.sentence!r}")
        end = begin + len(fact.sentence)
        sentences.append(_token_span(offsets, begin, end))
        answers.append(_token_span(offsets, end - len(fact.answer), end))
    return Reading(encoding["input_ids"], facts, tuple(sentences), tuple(answers))


def _token_span(offsets: list[tuple[int, int]], begin: int, end: int) -> tuple[int, int]:
    """The tokens that share a character with ``[begin, end)``; special tokens have empty offsets and share none."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > begin]
    return inside[0], inside[-1] + 1
