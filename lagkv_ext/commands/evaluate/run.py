"""Runs one evaluation from arguments to results.jsonl, report.html and pictures, as `lagkv evaluate` does."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lagkv_ext.commands.evaluate import certify, cost, methods, presets, recommend, storage
from lagkv_ext.commands.evaluate.presets import PRESETS, Preset
from lagkv_ext.commands.evaluate.report import write_report
from lagkv_ext.commands.evaluate.runner import Progress, Runner, check_not_empty, environment
from lagkv_ext.commands.evaluate.summary import Summary, summarise
from lagkv_ext.commands.evaluate.tasks import TASKS, Spec, build
from lagkv_ext.commands.evaluate.tasks import files as task_files
from lagkv_ext.commands.evaluate.types import EvaluationError, Sample, Setting, Skipped

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Plan:
    """An evaluation to run. Empty fields are those of the preset."""

    preset: str = "quick"
    tasks: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    keep_ratios: tuple[float, ...] = ()
    lag_sizes: tuple[int, ...] = ()
    sink_size: int = 16
    chunks: tuple[str, ...] = ()  # how contexts are read: "whole", tokens of a chunk, "decode"
    size: int | None = None  # tokens of a generated context
    prompts: int | None = None  # of each generated task
    data: Path | None = None  # own texts and prompts: then no generated tasks unless named
    longbench: tuple[Path, ...] = ()
    longbench_prompts: Path | None = None
    limit: int | None = None  # samples of each LongBench file
    chat: bool = False
    seed: int = 0
    search: bool = False
    tolerance: float = recommend.TOLERANCE
    confidence: float = certify.CONFIDENCE
    machine: cost.Machine = field(default_factory=cost.Machine)
    context: int | None = None
    batch: int | None = None

    def check(self) -> Preset:
        """The preset with this plan's changes. EvaluationError for a value that makes no sense."""
        if self.preset not in PRESETS:
            raise EvaluationError(f"there is no preset {self.preset!r}; there are {', '.join(PRESETS)}")
        for name, values, fits in (
            ("keep ratio", self.keep_ratios, lambda x: 0 < x <= 1),
            ("lag size", self.lag_sizes, lambda x: x >= 1),
        ):
            for value in values:
                if not fits(value):
                    raise EvaluationError(
                        f"every {name} must be {'in (0, 1]' if 'ratio' in name else 'at least 1'}, got {value}"
                    )
        for chunk in self.chunks:
            if chunk not in ("whole", "decode") and not (chunk.isdecimal() and int(chunk) > 0):
                raise EvaluationError(
                    f"contexts are read whole, in decode, or in chunks of a number of tokens, got {chunk!r}"
                )
        if self.sink_size < 0:
            raise EvaluationError(f"sink_size must be at least 0, got {self.sink_size}")
        certify.check(self.confidence, self.tolerance)
        for method in self.methods:
            if method != "full":
                methods.resolve(method)
        preset = PRESETS[self.preset]
        specs = preset.specs
        if self.tasks:
            unknown = [t for t in self.tasks if t not in TASKS]
            if unknown:
                raise EvaluationError(f"there is no task {unknown[0]!r}; there are {', '.join(TASKS)}")
            known = {s.task for s in specs}
            size = max((s.size for s in specs), default=1000)
            specs = tuple(s for s in specs if s.task in self.tasks) + tuple(
                Spec(t, size, 5) for t in self.tasks if t not in known
            )
        elif self.data or self.longbench:
            specs = ()
        specs = tuple(
            dataclasses.replace(s, size=self.size or s.size, prompts=self.prompts or s.prompts) for s in specs
        )
        return dataclasses.replace(
            preset,
            specs=specs,
            methods=self.methods or preset.methods,
            keep_ratios=self.keep_ratios or preset.keep_ratios,
            lag_sizes=self.lag_sizes or preset.lag_sizes,
            # Single settings of a preset go with its own methods and ratios.
            extra=() if self.methods or self.keep_ratios or self.lag_sizes else preset.extra,
        )


@dataclass(frozen=True)
class Outcome:
    """Paths of the results, and the recommendation. ``interrupted``: stopped by Ctrl-C, reported as far as measured."""

    results: Path
    report: Path
    recommendation: recommend.Recommendation
    summary: Summary
    skipped: tuple[Skipped, ...]
    interrupted: bool = False


def evaluate(
    loaded: Any,
    plan: Plan,
    out: Path,
    *,
    fresh: bool = False,
    command: str = "",
    progress: Progress = lambda what, done, total: None,
) -> Outcome:
    """Evaluate a `lagkv_ext.commands.models.LoadedModel` and write everything to the folder ``out``.

    What ``out/results.jsonl`` holds already is taken up, unless ``fresh``.

    Raises EvaluationError: wrong arguments, nothing to evaluate, results of another model in ``out``, a full disk.
    KeyboardInterrupt is caught: what has been measured is reported.
    """
    preset = plan.check()
    samples, skipped = collect(loaded.tokenizer, plan, preset.specs, loaded.model)
    check_not_empty(samples, skipped)
    header = {
        **environment(loaded),
        "seed": plan.seed,
        "command": command,
        "plan": json.loads(json.dumps(dataclasses.asdict(plan), default=str)),
        "skipped": [dataclasses.asdict(x) for x in skipped],
    }
    path = out / RESULTS
    interrupted = False
    try:
        with storage.Results(path, header, fresh=fresh) as results:
            runner = Runner(loaded.model, loaded.tokenizer, results, seed=plan.seed)
            wanted = presets.settings(
                preset.methods, preset.keep_ratios, preset.lag_sizes, plan.sink_size, preset.extra
            )
            if plan.chunks:
                wanted = presets.in_pieces(wanted, plan.chunks)
            try:
                if plan.search:
                    _search(runner, samples, plan, preset, progress)
                else:
                    runner.run(samples, wanted, progress)
                _certify(results, plan)
            except KeyboardInterrupt:
                interrupted = True
            records = list(results.records)
            header = results.header
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EPERM, errno.EEXIST, errno.ENOSPC):
            raise EvaluationError(f"{out} cannot be written: {error}") from error
        raise
    report, found = _report(header, records, out, plan)
    return Outcome(
        path, report, found, summarise(records, seed=plan.seed), (*skipped, *runner.skipped), interrupted
    )


def collect(
    tokenizer: Any, plan: Plan, specs: Sequence[Spec], model: Any = None
) -> tuple[list[Sample], list[Skipped]]:
    """All samples of a plan, and what could not be read. ``model``: for tasks whose text the model writes itself."""
    samples = build(specs, tokenizer, plan.seed, model)
    skipped: list[Skipped] = []
    templates = task_files.read_templates(plan.longbench_prompts) if plan.longbench_prompts else None
    for found, left in (
        task_files.longbench(list(plan.longbench), limit=plan.limit, templates=templates, chat=plan.chat),
        task_files.own(plan.data, chat=plan.chat) if plan.data else ([], []),
    ):
        samples += found
        skipped += left
    names: dict[tuple[str, str], int] = {}
    for i, sample in enumerate(samples):
        # Two files may use the same ids; results are told apart by task and name.
        count = names[sample.task, sample.name] = names.get((sample.task, sample.name), 0) + 1
        if count > 1:
            samples[i] = dataclasses.replace(sample, name=f"{sample.name} ({count})")
    return in_turn(samples), skipped


def in_turn(samples: Sequence[Sample]) -> list[Sample]:
    """The tasks' samples in turn, so that a run that is stopped early has measured all tasks about equally often."""
    by_task: dict[str, list[Sample]] = {}
    for sample in samples:
        by_task.setdefault(sample.task, []).append(sample)
    rounds = itertools.zip_longest(*by_task.values())
    return [sample for each in rounds for sample in each if sample is not None]


def _search(runner: Runner, samples: list[Sample], plan: Plan, preset: Preset, progress: Progress) -> None:
    def measure(settings: Sequence[Setting]) -> Summary:
        label = settings[0].name
        runner.run(
            samples, settings, lambda what, done, total: progress(f"searching, {label}: {what}", done, total)
        )
        return summarise(runner.results.records, seed=plan.seed)

    options: dict[str, Any] = {"keep_ratios": plan.keep_ratios} if plan.keep_ratios else {}
    recommend.search(
        measure,
        methods=[m for m in plan.methods if methods.LagKV.parse(m)] or recommend.SEARCHED,
        lag_sizes=plan.lag_sizes or (128, 64),
        layers=runner.layers,
        sink_size=plan.sink_size,
        tolerance=plan.tolerance,
        **options,
    )


def _certify(results: storage.Results, plan: Plan) -> None:
    """Test on the new prompts, and write down that they were used: the same prompts are never tested twice."""
    found = certify.attempt(
        results.records,
        testable=recommend.deployable,
        tolerance=plan.tolerance,
        confidence=plan.confidence,
        searched=plan.search,
        seed=plan.seed,
    )
    if found is not None:
        results.add(found.to_json())


def _report(
    header: dict[str, Any], records: list[dict[str, Any]], out: Path, plan: Plan
) -> tuple[Path, recommend.Recommendation]:
    try:
        return write_report(
            [header],
            records,
            out,
            tolerance=plan.tolerance,
            confidence=plan.confidence,
            machine=plan.machine,
            context=plan.context,
            batch=plan.batch,
        )
    except OSError as error:
        raise EvaluationError(
            f"the report could not be written to {out} ({error}); the results are kept in {out / RESULTS}"
        ) from error


def report_again(results: Path, out: Path, **options: Any) -> tuple[Path, recommend.Recommendation]:
    """`write_report` from a results file, without a model."""
    headers, records = storage.load(results)
    return write_report(headers, records, out, **options)
