"""Makes samples from task names and sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lagkv_ext.commands.evaluate.tasks import fidelity, generated, synthetic
from lagkv_ext.commands.evaluate.types import EvaluationError, Sample


class Counter:
    """Counts and cuts text with the model's tokenizer. ``model``: for tasks whose text the model writes itself."""

    def __init__(self, tokenizer: Any, model: Any = None):
        self.tokenizer, self.model = tokenizer, model

    def __call__(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"])

    def pieces(self, text: str, tokens: int = 1) -> list[str]:
        """The text in pieces of ``tokens`` tokens each, cut where tokens end; joined they are the text."""
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        ends = sorted({b for a, b in offsets if b > a})[tokens - 1 :: tokens]
        if not ends or ends[-1] < len(text):
            ends.append(len(text))
        return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True)
class Spec:
    """A task with its size: tokens of a context, prompts, and the task's own arguments."""

    task: str
    size: int = 0
    prompts: int = 0
    arguments: tuple[tuple[str, Any], ...] = ()

    def __call__(self, seed: int, counter: Counter) -> list[Sample]:
        if self.task not in TASKS:
            raise EvaluationError(f"there is no task {self.task!r}; there are {', '.join(TASKS)}")
        return TASKS[self.task](seed, counter, self.size, self.prompts, dict(self.arguments))


Maker = Callable[[int, Counter, int, int, dict[str, Any]], list[Sample]]


def _synthetic(make: Callable[..., list[Sample]], **fixed: Any) -> Maker:
    return lambda seed, counter, size, prompts, more: make(
        seed, counter, size=size, prompts=prompts, **{**fixed, **more}
    )


TASKS: dict[str, Maker] = {
    "passkey": _synthetic(synthetic.passkey),
    "facts": _synthetic(synthetic.hidden_facts),
    "facts-ja": _synthetic(synthetic.hidden_facts, language="ja"),
    "facts-zh": _synthetic(synthetic.hidden_facts, language="zh"),
    "facts-written": generated.written_facts,
    "codes": _synthetic(synthetic.formal_codes),
    "letter": lambda seed, counter, size, prompts, more: fidelity.letter(),
    "multikey-uuid": _synthetic(synthetic.multikey, kind="uuid"),
    "multikey-digits": _synthetic(synthetic.multikey, kind="digits"),
    "multikey-words": _synthetic(synthetic.multikey, kind="words"),
    "variables": _synthetic(synthetic.variables),
    "words-common": _synthetic(synthetic.counting, kind="common"),
    "words-frequent": _synthetic(synthetic.counting, kind="frequent"),
    "fidelity": lambda seed, counter, size, prompts, more: fidelity.fidelity(
        seed, counter.pieces, size=size, prompts=prompts, **more
    ),
}

DESCRIPTIONS = {
    "passkey": "a long number hidden in repeated filler; share of its digits said right",
    "facts": "codes of cities in prose, asked one by one; share of the digits said right",
    "facts-ja": "the same in Japanese",
    "facts-zh": "the same in Chinese",
    "facts-written": "facts in text that the model wrote itself, asked one by one; share of the digits said right",
    "codes": "five-digit numbers in the clauses of a contract, asked one by one; share of the digits said right",
    "letter": "facts of a natural letter, asked one by one; share of the answer's tokens said right",
    "multikey-uuid": "a list of keys with UUIDs; share of a UUID's tokens said right",
    "multikey-digits": "a list of keys with 16-digit numbers; share of the digits said right",
    "multikey-words": "a list of keys with six random words each; share of the words' tokens said right",
    "variables": (
        "which variables hold a number through assignments; share of the right ones "
        "among the model's first choices"
    ),
    "words-common": "the most common words of a list; share of the right ones among the model's first choices",
    "words-frequent": "the three most frequent words of a list with falling frequencies; share among the first choices",
    "fidelity": "going on with prose and code; share of places where the most likely token is that of the full cache",
    "own-text": "going on with your texts; share of places where the most likely token is that of the full cache",
    "own-prompts": "your prompts: marked answers, or agreement with what the full cache says",
}


def build(specs: Sequence[Spec], tokenizer: Any, seed: int, model: Any = None) -> list[Sample]:
    """All samples of the specs. Raises EvaluationError for an unknown task."""
    counter = Counter(tokenizer, model)
    return [sample for spec in specs for sample in spec(seed, counter)]
