"""Data that the parts of the evaluation exchange: samples, questions, settings, results, and the error for users."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


class EvaluationError(Exception):
    """An error that the user can mend: the message says what was wrong and what to do."""


@dataclass(frozen=True)
class Question:
    """One question on a context that has been read.

    How it is asked and marked depends on ``kind`` (all scores in [0, 1]):

    - "literal": ``text + answer`` is read in one go; score is the share of the answer's tokens that the model
      would have said (each given the right ones before it), and ``exact`` tells whether all were, which is
      what greedy decoding would say.
    - "rank": the logits after ``text`` rank the first tokens of ``candidates``; score is the share of
      ``answers`` among the first ``len(answers)`` of them.
    - "generate": greedy decoding of up to ``max_tokens`` tokens, stopped at ``stop``, marked by ``metric``
      against ``answers``.
    - "continue": ``answer`` is the text that really follows; score is the agreement with the full cache's most likely
      tokens, besides the KL divergence from the full cache and the negative log likelihood.
    - "imitate": as "continue", along what the full cache itself says greedily after ``text``: for prompts
      without an answer.
    """

    text: str
    kind: str = "literal"
    answer: str = ""
    answers: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    max_tokens: int = 32
    stop: tuple[str, ...] = ()
    metric: str = "contains"
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def binary(self) -> bool:
        """Tells whether every score is 0 or 1, whatever the model says."""
        if self.kind == "rank":
            return len(self.answers) == 1
        return self.kind == "generate" and self.metric in ("contains", "exact")


@dataclass(frozen=True)
class Sample:
    """A context that is read once, and the questions asked on it one by one, each on a fresh copy of the cache."""

    task: str
    name: str  # unique within the task; results are resumed by it
    context: str
    questions: tuple[Question, ...]
    facts: dict[str, Any] = field(default_factory=dict)  # depth, length, language: what the report groups by
    chat: bool = False  # wrap context and question in the model's chat template


@dataclass(frozen=True)
class Setting:
    """One cache to be measured: a method at one size.

    ``method`` is a name of `lagkv_ext.commands.evaluate.methods` ("full", "lagkv-std", ...), ``"cache:..."`` for the
    `LagKVCache` itself, or a user's ``module:function``. The number of rows kept is that of LagKV with ``keep_ratio``,
    ``lag_size`` and ``sink_size``, for every method.
    """

    method: str
    keep_ratio: float = 1.0
    lag_size: int = 128
    sink_size: int = 16
    options: tuple[tuple[str, Any], ...] = ()  # sorted, so that equal settings are equal

    @property
    def name(self) -> str:
        if self.method == "full":
            return "full"
        options = "".join(f",{key}={value}" for key, value in self.options)
        return f"{self.method}@{self.keep_ratio:g},L={self.lag_size},sink={self.sink_size}{options}"

    @property
    def label(self) -> str:
        """The method without its size, as tables and legends name it."""
        options = ", ".join(f"{key}={value}" for key, value in self.options)
        return self.method + (f" ({options})" if options else "")

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "options": dict(self.options)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Setting:
        return cls(**{**data, "options": tuple(sorted(data.get("options", {}).items()))})


FULL = Setting("full")


@dataclass(frozen=True)
class Skipped:
    """Something that was left out, and why: listed in the results and in the report."""

    what: str
    why: str
