"""Runs samples through settings: every context is read once with the full cache, and forked for every setting."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import platform
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lagkv_ext.cache.fidelity import forward
from lagkv_ext.commands.evaluate import methods, onednn
from lagkv_ext.commands.evaluate.ask import ONE_PASS, Asker, Encoded
from lagkv_ext.commands.evaluate.cost import shape_of
from lagkv_ext.commands.evaluate.prefill import Prefill, can_batch, fork_cache, read
from lagkv_ext.commands.evaluate.storage import Results
from lagkv_ext.commands.evaluate.types import FULL, EvaluationError, Question, Sample, Setting, Skipped
from lagkv_ext.commands.models import full_attention_layers

_LARGEST_BATCH = 16
_LARGEST_STREAM = 8

Progress = Callable[[str, int, int], None]  # what is being done, samples done, samples in all


@dataclass
class Work:
    """A sample as tokens, with the settings that are still to be measured on it."""

    sample: Sample
    digest: str
    context: str  # digest of the context alone: samples with the same one are not independent
    ids: Any
    encoded: list[Encoded]
    settings: list[Setting]
    missing: set[Setting]  # of the settings: not measured yet


class _Clock:
    """Time since it was made. Processor time besides the clock's: on a shared machine only that can be compared."""

    def __init__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def spent(self, shares: int) -> dict[str, float]:
        now = time.perf_counter(), time.process_time()
        clock, cpu = (round((b - a) / shares, 3) for a, b in zip(self.began, now, strict=True))
        return {"seconds": clock, "cpu_seconds": cpu}


def digest(sample: Sample) -> str:
    """Hash of everything that the model is shown; earlier results are reused for the very same sample only."""
    shown = [
        sample.context,
        sample.chat,
        [
            [q.kind, q.text, q.answer, q.answers, q.candidates, q.metric, q.max_tokens, q.stop]
            for q in sample.questions
        ],
    ]
    return hashlib.blake2b(json.dumps(shown, ensure_ascii=False).encode(), digest_size=8).hexdigest()


class Runner:
    """Measures; what is measured goes to ``results`` at once, one record per sample and setting."""

    def __init__(self, model: Any, tokenizer: Any, results: Results, *, seed: int = 0):
        self.model, self.results, self.seed = model, results, seed
        self.asker = Asker(model, tokenizer)
        self.layers = full_attention_layers(model.config)
        self.skipped: list[Skipped] = []

    def run(
        self,
        samples: Sequence[Sample],
        settings: Sequence[Setting],
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        """Measure every setting on every sample, the full cache first; what the results hold already is not repeated.

        Samples that do not fit the model are listed in ``skipped`` and in the results. Raises EvaluationError.
        """
        settings = [FULL, *(s for s in dict.fromkeys(settings) if s != FULL)]
        chosen = {s.method: methods.resolve(s.method) for s in settings if not _special(s)}
        for number, sample in enumerate(samples):
            progress(f"{sample.task}: {sample.name}", number, len(samples))
            work = self._prepare(sample, settings)
            if work is not None:
                self._measure(work, chosen, lambda what, n=number: progress(what, n, len(samples)))  # type: ignore[misc]
        progress("done", len(samples), len(samples))

    def _prepare(self, sample: Sample, settings: Sequence[Setting]) -> Work | None:
        hashed = digest(sample)
        done = self.results.done()
        missing = {s for s in settings if (sample.task, sample.name, hashed, s.name) not in done}
        if not missing:
            return None
        ids, ending = self.asker.context(sample.context, chat=sample.chat)
        encoded = [self.asker.encode(q, ending) for q in sample.questions]
        needed = ids.shape[1] + max(
            self.asker.needed(e, q) for e, q in zip(encoded, sample.questions, strict=True)
        )
        if self.asker.limit is not None and needed > self.asker.limit:
            self._skip(
                sample,
                hashed,
                "*",
                f"needs {needed} tokens, and the model's context is {self.asker.limit} tokens long",
            )
            return None
        context = hashlib.blake2b(sample.context.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        return Work(sample, hashed, context, ids, encoded, list(settings), missing)

    def _measure(self, work: Work, chosen: dict[str, methods.Method], say: Callable[[str], None]) -> None:
        sample = work.sample
        say(f"{sample.task}: reading {work.ids.shape[1]} tokens")
        watch = any(s.method in methods.NEED_ATTENTION for s in work.settings)
        clock = _Clock()
        prefill = read(self.model, work.ids, self.layers, attention=watch)
        references: list[dict[str, Any]] = [{} for _ in sample.questions]
        compared = any(q.kind in ("continue", "imitate") for q in sample.questions)
        # Not asked again where an earlier run measured it, and nothing is held against it token by token.
        if FULL in work.missing or compared:
            say(f"{sample.task}: full")
            self._record(work, prefill, [FULL], prefill.fork, references, clock)
        for group in self._groups(work, prefill, chosen):
            if not work.missing.isdisjoint(group):
                say(_several(sample, group))
                fork = functools.partial(prefill.fork, *group.values())
                self._record(work, prefill, list(group), fork, references, _Clock())
        for together in self._streams(work, prefill):
            if not work.missing.isdisjoint(together):
                say(_several(sample, together))
                clock = _Clock()
                cache = self._in_pieces(together, work, chosen)
                fork = functools.partial(fork_cache, cache)
                self._record(work, prefill, together, fork, references, clock)
        for setting in work.settings:
            if setting.method == "lagkv-cache" and setting in work.missing:
                say(f"{sample.task}: {setting.name}")
                clock = _Clock()
                fork = functools.partial(copy.deepcopy, self._through_cache(setting, prefill))
                self._record(work, prefill, [setting], fork, references, clock)

    def _groups(
        self, work: Work, prefill: Prefill, chosen: dict[str, methods.Method]
    ) -> list[dict[Setting, dict[int, torch.Tensor]]]:
        """Settings that keep equally many rows, with these rows: they are asked together, as a batch.

        Groups do not depend on what was measured before, so that a resumed run computes what an uninterrupted
        one does.
        """
        batched = _batched(work, prefill)
        groups: list[dict[Setting, dict[int, torch.Tensor]]] = []
        for setting in work.settings:
            if _special(setting) or _chunk(setting) is not None:
                continue
            try:
                index = self._select(setting, work, prefill, chosen)
            except methods.NotPossible as reason:
                self._skip(work.sample, work.digest, setting.name, str(reason))
                continue
            rows = index[self.layers[0]].shape[2]
            # All forks together hold at most four times the rows of the full cache.
            most = max(1, min(_LARGEST_BATCH, 4 * prefill.tokens // rows)) if batched else 1
            for group in groups:
                other = next(iter(group.values()))
                if other[self.layers[0]].shape[2] == rows and len(group) < most:
                    group[setting] = index
                    break
            else:
                groups.append({setting: index})
        return groups

    def _streams(self, work: Work, prefill: Prefill) -> list[list[Setting]]:
        """Settings whose caches are compressed while the context is read, in groups that read it together."""
        found: dict[tuple[Any, ...], list[Setting]] = {}
        for setting in work.settings:
            if _special(setting) or (chunk := _chunk(setting)) is None:
                continue
            if setting.method in methods.NEED_ATTENTION:
                reason = "attention is summed over a prompt that is read in one piece"
                self._skip(work.sample, work.digest, setting.name, reason)
                continue
            short = methods.too_short(setting, prefill.tokens)
            if short is not None:
                self._skip(work.sample, work.digest, setting.name, short)
                continue
            shape = setting.keep_ratio, setting.lag_size, setting.sink_size, str(chunk)
            found.setdefault(shape, []).append(setting)
        most = _LARGEST_STREAM if _batched(work, prefill) else 1
        return [x[i : i + most] for x in found.values() for i in range(0, len(x), most)]

    def _in_pieces(self, settings: list[Setting], work: Work, chosen: dict[str, methods.Method]) -> Any:
        from lagkv_ext.commands.evaluate.stream import pieces, read_in_pieces

        first, chunk = settings[0], _chunk(settings[0])
        assert chunk is not None
        cuts = pieces(work.ids.shape[1], chunk, first.sink_size, first.lag_size)
        prompt = f"{work.sample.task}/{work.sample.name}"
        layers = {
            i: [
                (
                    chosen[x.method],
                    functools.partial(methods.layer_of, x, layer=i, prompt=prompt, seed=self.seed),
                )
                for x in settings
            ]
            for i in self.layers
        }
        return read_in_pieces(self.model, work.ids, layers, cuts)

    def _record(
        self,
        work: Work,
        prefill: Prefill,
        settings: list[Setting],
        fork: Callable[[], Any],
        references: list[dict[str, Any]],
        clock: _Clock,
    ) -> None:
        """Asks every question on a fresh fork, whose batch holds a sequence per setting; adds the missing results."""
        sample, count = work.sample, len(settings)
        cache = fork()
        rows = sum(cache.layers[i].keys.shape[2] for i in self.layers) / len(self.layers)
        full_bytes = _bytes([cache.layers[i] for i in self.layers]) // count
        all_bytes = _bytes(cache.layers) // count
        answers: list[list[dict[str, Any]]] = []
        for question, encoded, reference in zip(sample.questions, work.encoded, references, strict=True):
            if answers:  # a question uses its fork up
                cache = fork()
            answers.append(self.asker.ask(question, encoded, cache, prefill.tokens, reference, count))
        spent = clock.spent(count)
        for i, setting in enumerate(settings):
            if setting not in work.missing:
                continue
            marks = [{k: _short(v) for k, v in of_question[i].items()} for of_question in answers]
            self.results.add(
                {
                    "kind": "result",
                    "task": sample.task,
                    "sample": sample.name,
                    "digest": work.digest,
                    "context": work.context,
                    "setting_name": setting.name,
                    "setting": setting.to_json(),
                    "facts": sample.facts,
                    "tokens": prefill.tokens,
                    "rows": rows,
                    "full_layer_bytes": full_bytes,
                    "cache_bytes": all_bytes,
                    **spent,
                    "questions": [m | _shown(q) for m, q in zip(marks, sample.questions, strict=True)],
                }
            )

    def _select(
        self, setting: Setting, work: Work, prefill: Prefill, chosen: dict[str, methods.Method]
    ) -> dict[int, torch.Tensor]:
        index = {}
        for i in self.layers:
            key, value = prefill.rows(i)
            layer = methods.layer_of(
                setting,
                key,
                value,
                layer=i,
                prompt=f"{work.sample.task}/{work.sample.name}",
                seed=self.seed,
                attention=prefill.attention.get(i),
            )
            index[i] = methods.select(chosen[setting.method], layer)
        return index

    def _through_cache(self, setting: Setting, prefill: Prefill) -> Any:
        """The context read by `LagKVCache` itself, in one piece or in chunks: what a deployment does."""
        from lagkv_ext import LagKVCache

        options = dict(setting.options)
        chunk = options.pop("chunk", None) or prefill.tokens
        ratios = {
            int(k.removeprefix("layer")): options.pop(k) for k in list(options) if k.startswith("layer")
        }
        cache = LagKVCache(
            self.model.config,
            keep_ratio=setting.keep_ratio,
            lag_size=setting.lag_size,
            sink_size=setting.sink_size,
            layer_keep_ratio=ratios or None,
            **options,
        )
        with torch.inference_mode():
            for begin in range(0, prefill.tokens, chunk):
                forward(
                    self.model, prefill.ids[:, begin : begin + chunk], cache, position=begin, logits_to_keep=1
                )
        return cache

    def _skip(self, sample: Sample, hashed: str, setting: str, why: str) -> None:
        self.skipped.append(
            Skipped(f"{sample.task}/{sample.name}" + ("" if setting == "*" else f" with {setting}"), why)
        )
        known = {
            (x["task"], x["sample"], x["digest"], x["setting_name"])
            for x in self.results.records
            if "task" in x
        }
        if (sample.task, sample.name, hashed, setting) not in known:
            self.results.add(
                {
                    "kind": "skipped",
                    "task": sample.task,
                    "sample": sample.name,
                    "digest": hashed,
                    "setting_name": setting,
                    "what": self.skipped[-1].what,
                    "why": why,
                }
            )


def _special(setting: Setting) -> bool:
    return setting == FULL or setting.method == "lagkv-cache"


def _chunk(setting: Setting) -> int | str | None:
    """The tokens of a chunk in which the setting's context is read, "decode", or None for one piece."""
    return dict(setting.options).get("chunk")


def _batched(work: Work, prefill: Prefill) -> bool:
    """True where several caches can be asked the sample's questions at once."""
    return can_batch(prefill.cache) and all(q.kind in ONE_PASS for q in work.sample.questions)


def _several(sample: Sample, settings: Collection[Setting]) -> str:
    first, more = next(iter(settings)), len(settings) - 1
    return f"{sample.task}: {first.name}" + (f" and {more} more" if more else "")


def _bytes(layers: Sequence[Any]) -> int:
    held = (
        t for x in layers for t in (getattr(x, "keys", None), getattr(x, "values", None)) if t is not None
    )
    return sum(t.numel() * t.element_size() for t in held)


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _shown(question: Question) -> dict[str, Any]:
    """The parts of a question that a reader of the results needs."""
    answer = question.answer if question.kind == "literal" else "; ".join(question.answers)
    return {
        "asked": question.text[-120:],
        "wanted": answer[:200],
        "how": question.kind,
        "binary": question.binary,
    }


def environment(loaded: Any) -> dict[str, Any]:
    """The header of the results file: all that is needed to repeat a run."""
    import transformers

    import lagkv_ext

    parameter = next(loaded.model.parameters())
    return {
        "model": loaded.name,
        "weights": Path(loaded.path).name,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "versions": {
            "lagkv_ext": lagkv_ext.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "linear": "oneDNN"
        if any(isinstance(x, onednn.OneDnnLinear) for x in loaded.model.modules())
        else "torch",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "shape": {
            **shape_of(loaded.model.config),
            "parameters": sum(p.numel() for p in loaded.model.parameters()),
            "weight_bytes": sum(p.numel() * p.element_size() for p in loaded.model.parameters()),
            "element_size": parameter.element_size(),
        },
    }


def check_not_empty(samples: Sequence[Sample], skipped: Sequence[Skipped]) -> None:
    """EvaluationError where nothing is left to measure; it lists what was left out."""
    if not samples:
        reasons = "".join(f"\n  {x.what}: {x.why}" for x in skipped)
        raise EvaluationError(
            "there is nothing to evaluate: the dataset is empty" + (reasons and f"; left out:{reasons}")
        )
