"""Verdict of the checks on a family: equal, refused with the reason, cannot be made with the reason, or different."""

from __future__ import annotations

import dataclasses
import traceback
from pathlib import Path
from typing import Any

import torch

import lagkv_ext
from lagkv_ext import LagKVCache, LagKVEncoderDecoderCache
from lagkv_ext.cache import models
from tests.sweep import checks, families, tiny
from tests.sweep.subject import NothingToCompare, Subject, subject_of

EQUAL, REFUSED, CANNOT_BE_MADE, DIFFERENT, NOTHING = (
    "equal", "refused", "cannot be made", "DIFFERENT", "nothing to compare",
)  # fmt: skip
#: Attention implementations, and the dtypes in which they are tried. transformers' eager masks overflow in float64.
ATTENTION = {"sdpa": (torch.float64, torch.float32), "eager": (torch.float32,)}
#: The caches of transformers that are left alone, in words.
_OTHER_LAYERS = {
    "DynamicSlidingWindowLayer": "sliding or chunked windows",
    "LinearAttentionLayer": "linear attention or convolutions",
    "LinearAttentionAndFullAttentionLayer": "linear attention in the same layer",
    "DummyLayer": "layers without keys and values of their own",
}
_PACKAGE = Path(lagkv_ext.__file__).parent


@dataclasses.dataclass(frozen=True)
class Outcome:
    status: str
    text: str = ""

    @classmethod
    def of_text(cls, text: str) -> Outcome:
        status, _, rest = text.partition(": ")
        return cls(status, rest)

    def __str__(self) -> str:
        return f"{self.status}: {self.text}" if self.text else self.status


@dataclasses.dataclass
class Verdict:
    """``checks``: outcomes by attention implementation and name of the check. ``left_alone``: what the model has beside
    compressed layers. ``evidence``: what goes wrong where a family is refused, measured with `DynamicCache`."""

    case: str
    status: str
    reason: str = ""
    evidence: str = ""
    left_alone: list[str] = dataclasses.field(default_factory=list)
    checks: dict[str, dict[str, Outcome]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_json(cls, data: dict[str, Any]) -> Verdict:
        outcomes = {
            attention: {check: Outcome.of_text(text) for check, text in made.items()}
            for attention, made in data["checks"].items()
        }
        return cls(**{**data, "checks": outcomes})


def judge(case: families.Case, attention: tuple[str, ...] = tuple(ATTENTION)) -> Verdict:
    try:
        config = tiny.tiny_config(families.config_class(case.family), dict(case.changes))
    except tiny.CannotBeMade as error:
        return Verdict(case.name, CANNOT_BE_MADE, str(error))
    reason = _refusal(config, case)
    for family in {config.model_type, config.get_text_config(decoder=True).model_type} - set(models.REFUSED):
        models.admit(family)  # what nobody judged is judged now
    try:
        subjects = {
            name: subject for name in attention if (subject := _subject(case, config, name)) is not None
        }
        if not subjects:
            raise tiny.CannotBeMade(f"it has none of the attention implementations {', '.join(attention)}")
    except (tiny.CannotBeMade, NothingToCompare) as error:
        if _refusal(config, case) is not None or (reason and isinstance(error, NothingToCompare)):
            return Verdict(case.name, REFUSED, reason, str(error))
        status = CANNOT_BE_MADE if isinstance(error, tiny.CannotBeMade) else DIFFERENT
        return Verdict(case.name, status, str(error))
    first = next(iter(subjects.values()))
    reason = _refusal(first.config, case)
    if reason is not None:
        return Verdict(case.name, REFUSED, reason, checks.why_refused(first) or "")
    outcomes = {
        name: {check: _outcome(run, subject) for check, run in checks.CHECKS.items()}
        for name, subject in subjects.items()
    }
    wrong = [
        f"{name}, {check}: {outcome.text}"
        for name, made in outcomes.items()
        for check, outcome in made.items()
        if outcome.status == DIFFERENT
    ]
    return Verdict(
        case.name, DIFFERENT if wrong else EQUAL, "; ".join(wrong), "", _left_alone(first), outcomes
    )


def _refusal(config: Any, case: families.Case) -> str | None:
    """Why the cache refuses a model; None where it does not."""
    try:
        (LagKVEncoderDecoderCache if case.encoder_decoder else LagKVCache)(config)
    except ValueError as error:
        return _without_name(str(error))
    except AttributeError as error:
        return f"transformers makes no cache for its configuration: {error}"
    return None


def _left_alone(subject: Subject) -> list[str]:
    kinds = {type(x).__name__ for x in subject.uncompressed().layers} - {"DynamicLayer"}
    words = {_OTHER_LAYERS.get(kind, kind) for kind in kinds} | set(
        models.uncompressed_layers(subject.config).values()
    )
    return sorted(words | {"cross-attention"} if models.cross_attention_layers(subject.config) else words)


def _subject(case: families.Case, config: Any, attention: str) -> Subject | None:
    """The model in the most precise dtype that it runs in; None where it has no such attention."""
    problem: Exception | None = None
    for dtype in ATTENTION[attention]:
        model = tiny.tiny_model(families.auto_class(case), config, attention, dtype)
        if model is None:
            return None
        subject = subject_of(model, case)
        try:
            subject.forward(None, subject.tokens(4), [4])
            return subject
        except Exception as error:
            problem = error
    raise tiny.CannotBeMade(f"forward: {type(problem).__name__}: {str(problem)[:160]}")


def _outcome(run: Any, subject: Subject) -> Outcome:
    try:
        return Outcome(EQUAL, run(subject) or "")
    except NothingToCompare as error:
        return Outcome(NOTHING, str(error))
    except checks.Different as error:
        return Outcome(DIFFERENT, str(error))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())
        if isinstance(error, ValueError) and Path(frame.filename).is_relative_to(_PACKAGE):
            return Outcome(REFUSED, _without_name(text))
        return Outcome(DIFFERENT, f"{type(error).__name__} in {Path(frame.filename).name}: {text[:200]}")


def _without_name(reason: str) -> str:
    """The reason alone, without the name of the configuration that it begins with."""
    head, _, rest = reason.partition(") ")
    if "Config (model_type" in head:
        return rest
    name, _, rest = reason.partition(" ")
    return rest if name.endswith("Config") else reason
