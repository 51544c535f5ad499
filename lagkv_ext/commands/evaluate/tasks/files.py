"""Tasks from the user's files: LongBench's JSONL, and a folder of own texts and prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from lagkv_ext.commands.evaluate.metrics import METRICS
from lagkv_ext.commands.evaluate.types import EvaluationError, Question, Sample, Skipped
from lagkv_ext.user_files import read_text

# LongBench's metric and answer length per dataset (its eval.py and dataset2maxlen.json).
LONGBENCH: dict[str, tuple[str, int]] = {
    "narrativeqa": ("f1", 128),
    "qasper": ("f1", 128),
    "multifieldqa_en": ("f1", 64),
    "multifieldqa_zh": ("f1", 64),
    "hotpotqa": ("f1", 32),
    "2wikimqa": ("f1", 32),
    "musique": ("f1", 32),
    "dureader": ("rouge_l", 128),
    "gov_report": ("rouge_l", 512),
    "qmsum": ("rouge_l", 512),
    "multi_news": ("rouge_l", 512),
    "vcsum": ("rouge_l", 512),
    "trec": ("classification", 64),
    "triviaqa": ("f1", 32),
    "samsum": ("rouge_l", 128),
    "lsht": ("classification", 64),
    "passage_count": ("number_share", 32),
    "passage_retrieval_en": ("number_share", 32),
    "passage_retrieval_zh": ("number_share", 32),
    "lcc": ("code_similarity", 64),
    "repobench-p": ("code_similarity", 64),
}
# LongBench cuts the answers of these at the first line break.
_ONE_LINE = {"trec", "triviaqa", "samsum", "lsht"}
_TEXT = {".txt", ".md"}
_LARGEST = 32 << 20


def longbench(
    paths: list[Path],
    *,
    limit: int | None = None,
    templates: dict[str, str] | None = None,
    chat: bool = False,
) -> tuple[list[Sample], list[Skipped]]:
    """Samples from LongBench JSONL files (``context``, ``input``, ``answers``, ``all_classes``, ``dataset``,
    ``language``, ``_id``).

    ``templates``: LongBench's own prompts (its config/dataset2prompt.json); without them a plain "Question:
    ... Answer:" is asked, and numbers are not those of the paper. ``limit``: of each file, the first samples.
    Unreadable files and lines are listed.
    """
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    for path in paths:
        taken = 0
        for number, entry in _jsonl(path, skipped):
            if limit is not None and taken == limit:
                break
            where = f"{path.name}:{number}"
            context, asked, answers = entry.get("context"), entry.get("input"), entry.get("answers")
            if not isinstance(context, str) or not isinstance(asked, str) or not _strings(answers):
                skipped.append(Skipped(where, "needs context and input (text) and answers (a list of texts)"))
                continue
            dataset = str(entry.get("dataset") or path.stem).removesuffix("_e")
            metric, length = LONGBENCH.get(dataset, ("f1", 64))
            before, after = _prompt(dataset, context, asked, templates)
            classes = entry.get("all_classes")
            question = Question(
                after,
                kind="generate",
                answers=tuple(answers),
                max_tokens=length,
                # samsum and the others continue with the next example; questions end with their line in base models.
                stop=("\n",) if dataset in _ONE_LINE or (not chat and metric == "f1") else (),
                metric=metric,
                extra={"classes": classes} if classes else {},
            )
            facts = {"language": entry.get("language", "en"), "length": entry.get("length")}
            name = str(entry.get("_id") or number)
            samples.append(Sample(f"longbench-{dataset}", name, before, (question,), facts, chat=chat))
            taken += 1
    return samples, skipped


def own(
    folder: Path, *, continuation: int = 64, answer_tokens: int = 64, chat: bool = False
) -> tuple[list[Sample], list[Skipped]]:
    """Samples from a folder (or one file) of the user's own .txt, .md and .jsonl files.

    A text file is read but for its last part, on which the fidelity of the continuation is measured. A line of a .jsonl
    file has ``prompt`` (or ``context`` and ``question``), and may have ``answer`` or ``answers`` with
    ``metric`` (default "contains"); without an answer the model is held against what it says with the full
    cache.

    Raises EvaluationError where the folder does not exist.
    """
    if not folder.exists():
        raise EvaluationError(f"there is no file or folder {folder}")
    files = sorted(x for x in folder.rglob("*") if x.is_file()) if folder.is_dir() else [folder]
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    for path in files:
        name = str(path.relative_to(folder)) if folder.is_dir() else path.name
        if path.suffix.lower() == ".jsonl":
            for number, entry in _jsonl(path, skipped):
                _own_prompt(f"{name}:{number}", entry, answer_tokens, chat, samples, skipped)
        elif path.suffix.lower() in _TEXT:
            text = _text(path, skipped)
            if text is not None:
                _own_text(name, text, continuation, samples, skipped)
        else:
            skipped.append(Skipped(name, "is no .txt, .md or .jsonl file"))
    return samples, skipped


def _own_text(name: str, text: str, continuation: int, samples: list[Sample], skipped: list[Skipped]) -> None:
    # About 6 characters hold a token of European text, 2 one of Chinese or Japanese: the tail is cut to
    # tokens when it is asked.
    tail = min(len(text) // 4, 8 * continuation)
    if tail < 8:
        skipped.append(Skipped(name, f"has {len(text)} characters, too few to hold a continuation"))
        return
    samples.append(continuation_sample("own-text", name, text[:-tail], text[-tail:], continuation, {}))


def continuation_sample(
    task: str, name: str, context: str, rest: str, tokens: int, facts: dict[str, Any]
) -> Sample:
    """Fidelity on up to ``tokens`` tokens of ``rest``, which follows the context."""
    question = Question("", kind="continue", answer=rest, max_tokens=tokens)
    return Sample(task, name, context, (question,), facts)


def _own_prompt(
    where: str, entry: dict[str, Any], tokens: int, chat: bool, samples: list[Sample], skipped: list[Skipped]
) -> None:
    context, asked = entry.get("context"), entry.get("question", "")
    if context is None:
        context, asked = entry.get("prompt"), ""
    if not isinstance(context, str) or not context.strip() or not isinstance(asked, str):
        skipped.append(Skipped(where, "needs a prompt, or a context and a question (text)"))
        return
    if not asked:
        # The end of a prompt is its question: it is asked on the compressed rest, or nothing would be left to ask.
        cut = context.rstrip().rfind("\n") if "\n" in context.strip() else max(0, len(context) - 200)
        context, asked = context[:cut], context[cut:]
        if not context.strip():
            skipped.append(Skipped(where, "is one short line: nothing would be compressed"))
            return
    else:
        asked = "\n\n" + asked
    answers = entry.get("answers", entry.get("answer"))
    answers = [answers] if isinstance(answers, str) else answers
    metric = entry.get("metric", "contains")
    if answers is None:
        question = Question(asked, kind="imitate", max_tokens=tokens)
    elif not _strings(answers) or metric not in METRICS:
        skipped.append(
            Skipped(where, f"needs answers as texts and a metric of {', '.join(METRICS)}, got {metric!r}")
        )
        return
    else:
        question = Question(asked, kind="generate", answers=tuple(answers), max_tokens=tokens, metric=metric)
    samples.append(Sample("own-prompts", where, context, (question,), {}, chat=chat))


def read_templates(path: Path) -> dict[str, str]:
    """LongBench's dataset2prompt.json: dataset -> prompt with {context} and {input}."""
    try:
        data = json.loads(read_text(path, str(path)))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read as LongBench's dataset2prompt.json: {error}") from error
    if not isinstance(data, dict) or not all(isinstance(x, str) and "{context}" in x for x in data.values()):
        raise EvaluationError(f"{path} must map datasets to prompts with {{context}} in them")
    return data


def _prompt(dataset: str, context: str, asked: str, templates: dict[str, str] | None) -> tuple[str, str]:
    """Splits a prompt into the part that is read and compressed and the part that is asked afterwards."""
    if templates is None:
        return context, f"\n\nQuestion: {asked}\nAnswer:" if asked else "\n\nSummary:"
    if dataset not in templates:
        raise EvaluationError(f"the LongBench prompts given have none for {dataset!r}")
    before, _, after = templates[dataset].partition("{context}")
    return before.replace("{input}", asked) + context, after.replace("{input}", asked)


def _text(path: Path, skipped: list[Skipped]) -> str | None:
    try:
        if path.stat().st_size > _LARGEST:
            skipped.append(Skipped(path.name, f"is larger than {_LARGEST >> 20} MiB"))
            return None
        return read_text(path, path.name)
    except (OSError, ValueError) as error:
        skipped.append(Skipped(path.name, f"cannot be read: {error}"))
        return None


def _jsonl(path: Path, skipped: list[Skipped]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = read_text(path, path.name).split("\n")
    except (OSError, ValueError) as error:
        skipped.append(Skipped(str(path), f"cannot be read: {error}"))
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            skipped.append(Skipped(f"{path.name}:{number}", f"is no JSON: {error}"))
            continue
        if isinstance(entry, dict):
            yield number, entry
        else:
            skipped.append(
                Skipped(f"{path.name}:{number}", f"must be a JSON object, got {type(entry).__name__}")
            )


def _strings(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)
