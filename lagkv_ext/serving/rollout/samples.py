"""Samples for human review: a prompt with the answers of the full and of the compressed cache, and people's verdicts.

A folder that only its user can read:

- ``000001.VARIANT.json``: one sample (`Sample`), written as a whole, never changed.
- ``verdicts.jsonl``: one line for each verdict (`Verdict`), appended.

Nothing is stored unless the rollout file has ``samples``. The text goes through the user's ``redact`` before it is
written anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lagkv_ext.serving.rollout.policy import RolloutError, Samples, integer, read_object, text_of
from lagkv_ext.serving.rollout.store import Store, place
from lagkv_ext.user_files import decode

_log = logging.getLogger(__name__)
VERDICTS = ("full", "compressed", "same")
_NAME = re.compile(r"(\d{6,})\.([a-z0-9][a-z0-9_.-]*)\.json")


@dataclass(frozen=True)
class Sample:
    """Two answers to one prompt. ``full`` and ``compressed`` are generated greedily, with nothing else different."""

    time: str  #: ISO 8601, UTC
    version: int  #: of the rollout file
    variant: str
    settings: Mapping[str, Any] = field(hash=False)  #: of the compressed cache
    prompt: str
    full: str
    compressed: str
    prompt_tokens: int
    id: str = ""  #: the file's name


@dataclass(frozen=True)
class Verdict:
    """A person's judgement of one sample, made without knowing which answer is whose."""

    sample: str
    variant: str
    version: int
    verdict: str  #: the better answer: one of `VERDICTS`
    reviewer: str
    first: str  #: which answer was shown first, "full" or "compressed"
    time: str


class SampleFolder:
    """Reads and writes the samples of a rollout. Safe among processes."""

    def __init__(self, store: Store, samples: Samples):
        self._store, self.most = store, samples.max
        self.path = store.path.parent / samples.folder  # an absolute folder stays so

    # -- samples

    def names(self) -> list[str]:
        """Names of all samples, in the order in which they were stored."""
        names = os.listdir(self.path) if self.path.is_dir() else []
        return sorted(x for x in names if _NAME.fullmatch(x))

    def is_full(self) -> bool:
        return len(self.names()) >= self.most

    def add(self, sample: Sample) -> str | None:
        """The name of the new sample; None where the folder has as many as it may. OSError where it cannot be written,
        and then nothing of it is left."""
        data = dataclasses.asdict(sample)
        del data["id"]
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        with self._store.locked():
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            names = self.names()
            if len(names) >= self.most:
                return None
            name = f"{max((int(x.split('.')[0]) for x in names), default=0) + 1:06}.{sample.variant}.json"
            place(self.path / name, text, first=True, mode=0o600)
            return name

    def read(self, name: str) -> Sample:
        """Raises OSError, and RolloutError where it is damaged."""
        source = f"the sample {self.path / name}"
        data = read_object(text_of(self.path / name, source), source)
        try:
            sample = Sample(**data, id=name)
            integer("version", sample.version, 1)
            for what in ("prompt", "full", "compressed", "variant", "time"):
                if not isinstance(found := getattr(sample, what), str):
                    raise RolloutError(f"{what} must be a string, got {found!r}")
        except (TypeError, RolloutError) as error:
            raise RolloutError(f"{source} is not usable: {error}") from error
        return sample

    # -- verdicts

    @property
    def _verdicts(self) -> Path:
        return self.path / "verdicts.jsonl"

    def record(self, verdict: Verdict) -> None:
        """Stored when this returns. Raises OSError."""
        line = json.dumps(dataclasses.asdict(verdict), ensure_ascii=False).encode() + b"\n"
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        fd = os.open(self._verdicts, flags, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":  # a disk that was full cut a line off
                line = b"\n" + line
            if os.write(fd, line) != len(line):
                raise OSError(f"{self._verdicts}: a line was written in part")
            os.fsync(fd)
        finally:
            os.close(fd)

    def verdicts(self) -> list[Verdict]:
        """All that can be read; a damaged line is logged and left out. OSError where the file cannot be read."""
        try:
            data = self._verdicts.read_bytes()
        except FileNotFoundError:
            return []
        found = []
        for line in data.splitlines():
            if not line.strip():
                continue
            try:
                found.append(_verdict_of(line))
            except (ValueError, TypeError) as error:
                _log.error("a line of %s is no verdict and is left out: %s", self._verdicts, error)
        return found

    def counts(self) -> dict[str, tuple[int, dict[str, int]]]:
        """By variant: the samples, and the verdicts by verdict. OSError where they cannot be read."""
        samples = Counter(str(_NAME.fullmatch(x)[2]) for x in self.names())  # type: ignore[index]
        verdicts: Counter[tuple[str, str]] = Counter((x.variant, x.verdict) for x in self.verdicts())
        names = dict.fromkeys([*samples, *(name for name, _ in verdicts)])
        return {
            name: (samples[name], {x: verdicts[name, x] for x in VERDICTS if verdicts[name, x]})
            for name in names
        }


def generate_both(
    model: Any, tokenizer: Any, input_ids: Any, settings: Mapping[str, Any], max_new_tokens: int
) -> tuple[str, str, str]:
    """The text of ``input_ids [1, N]``, and the answers with a `DynamicCache` and with a `LagKVCache` of ``settings``.

    Raises what the model or the tokenizer raises.
    """
    from transformers import DynamicCache

    from lagkv_ext import LagKVCache
    from lagkv_ext.cache.keyword import cache_argument

    prompt = input_ids.to(model.device)
    answers = []
    for cache in (DynamicCache(config=model.config), LagKVCache(model.config, **settings)):
        output = model.generate(
            prompt,
            attention_mask=prompt.new_ones(prompt.shape),
            **cache_argument(cache),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        answers.append(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))
    return tokenizer.decode(input_ids[0], skip_special_tokens=True), answers[0], answers[1]


def redacted(texts: tuple[str, str, str], redact: Callable[[str], str] | None) -> tuple[str, str, str]:
    """The texts as they may be stored. Raises what ``redact`` raises, and TypeError where one is not a string."""
    prompt, full, compressed = texts if redact is None else map(redact, texts)
    for text in (prompt, full, compressed):
        if not isinstance(text, str):
            who = "a sample's text must be" if redact is None else "redact must return"
            raise TypeError(f"{who} a string, got {type(text).__name__}")
    return prompt, full, compressed


def _verdict_of(line: bytes) -> Verdict:
    verdict = Verdict(**read_object(decode(line, "the line"), "the line"))
    integer("version", verdict.version, 1)
    for what in ("sample", "variant", "reviewer"):
        if not isinstance(found := getattr(verdict, what), str):
            raise ValueError(f"{what} must be a string, got {found!r}")
    if verdict.verdict not in VERDICTS:
        raise ValueError(f"verdict must be one of {', '.join(VERDICTS)}, got {verdict.verdict!r}")
    return verdict
