"""The measurement: one text, read once per cache, and every fact asked of a copy of each cache."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lagkv_ext.commands.demo.facts import DemoError, Fact, Reading
from lagkv_ext.commands.models import LoadedModel, full_attention_layers

DEFAULT_RATIOS = (2.0, 4.0, 8.0)
#: Arguments of `LagKVCache` by the name of the score. The blended one comes with what docs/quality.md recommends.
SCORING: Mapping[str, Mapping[str, Any]] = {
    "std": {"score": "std"},
    "cosine": {"score": "cosine"},
    "blend": {"score": "blend", "smooth": 3, "budget": "head"},
}
DEFAULT_SCORES = ("std", "blend")
LAG_SIZE, SINK_SIZE = 128, 16
ROUNDS = 3
# Further rounds only repeat time measurements; none is begun that would end later than this.
TIME_BUDGET_S = 150.0

Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all


@dataclass(frozen=True)
class Setting:
    """One cache to be measured. ``ratio`` tokens become one in every compressed partition; no score: the full cache.

    ``given``: all arguments of `LagKVCache`, where they come from a settings file (`setting_of`).
    """

    score: str | None = None
    ratio: float = 1.0
    given: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def name(self) -> str:
        if self.given is not None:
            return f"settings {self.ratio:g}x"
        return "full cache" if self.score is None else f"{self.score} {self.ratio:g}x"

    @property
    def keep_ratio(self) -> float:
        return 1.0 / self.ratio


@dataclass(frozen=True)
class Answer:
    """An answer that the model generated, alone and when shown the right one token by token.

    ``said`` is its greedy continuation, as many tokens as the answer has; ``right``: it begins with the answer.
    ``tokens_right`` of ``tokens``: the answer's tokens predicted right when all tokens before them are the true ones
    (teacher forcing); tokens of white space alone are not counted.
    """

    said: str
    right: bool
    tokens_right: int
    tokens: int


@dataclass
class Outcome:
    """One setting's results. Bytes are of storages held, not of views on them, after the text and one more token."""

    setting: Setting
    tokens_seen: int = 0
    tokens_kept: float = 0.0  # rows of a full-attention layer, on average over these layers
    full_layer_bytes: int = 0
    cache_bytes: int = 0
    compressions: int = 0
    kept_hash: str | None = None
    # bool [layers * heads, N]: which tokens of the text each head of the full-attention layers holds
    kept: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.bool))
    answer_tokens_kept: float = 1.0  # share of the answers' tokens that the heads still hold
    answer_tokens_by_chance: float = 1.0  # the same if partitions kept as many tokens, but any
    first_token_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    @property
    def answers_right(self) -> int:
        return sum(answer.right for answer in self.answers)

    @property
    def answer_tokens_right(self) -> float:
        """Share of the answers' tokens predicted right, see `Answer`."""
        return sum(answer.tokens_right for answer in self.answers) / sum(
            answer.tokens for answer in self.answers
        )

    @property
    def median_first_token_s(self) -> float:
        return statistics.median(self.first_token_s)

    @property
    def decode_tokens_per_s(self) -> float:
        return 1.0 / statistics.median(self.step_s)


@dataclass
class Result:
    """Everything that the table, the picture and the JSON file show."""

    model_name: str
    dtype: str
    device: str
    threads: int
    lag_size: int
    sink_size: int
    layer_count: int
    full_layers: list[int]
    heads: int
    weight_bytes: int
    reading: Reading
    outcomes: list[Outcome]
    rounds: int
    always_kept: tuple[int, int]  # leading and trailing tokens that no setting drops
    seconds: float

    @property
    def full(self) -> Outcome:
        return self.outcomes[0]


def settings_for(ratios: Sequence[float], scores: Sequence[str]) -> list[Setting]:
    """The full cache, then every score at every ratio."""
    return [Setting(), *(Setting(score, ratio) for ratio in ratios for score in scores)]


def setting_of(arguments: Mapping[str, Any]) -> Setting:
    """The cache that `lagkv_ext.read_settings` describes. ValueError: no valid share kept of a partition."""
    from lagkv_ext.ops import resolve_keep

    lag_size = arguments.get("lag_size", LAG_SIZE)
    keep = resolve_keep(arguments.get("keep"), arguments.get("keep_ratio"), lag_size)
    return Setting(arguments.get("score", DEFAULT_SCORES[0]), lag_size / keep, arguments)


def run(
    loaded: LoadedModel,
    reading: Reading,
    settings: Sequence[Setting],
    *,
    lag_size: int = LAG_SIZE,
    sink_size: int = SINK_SIZE,
    rounds: int = ROUNDS,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Result:
    """Measure every setting; ``settings[0]`` must be the full cache.

    Order: a short warm-up; one round in which every setting reads the text; every question to all settings in turn, so
    that a disturbance of the machine meets them alike; then rounds that only repeat the reading for its time. ``seed``
    decides the order of the settings in each of these turns. Generation is greedy, so answers do not depend on it.

    Raises DemoError: the text is longer than the model's context or too short to be compressed.
    """
    began = time.perf_counter()
    bench = _Bench(loaded, reading, lag_size, sink_size)
    bench.check(settings)
    outcomes = [Outcome(setting) for setting in settings]
    order = random.Random(seed)

    progress("warm-up", 0, 1)
    bench.warm_up(settings)
    progress("warm-up", 1, 1)

    caches = []
    for done, outcome in enumerate(outcomes):
        progress("reading the text", done, len(outcomes))
        caches.append(bench.read(outcome))
        bench.describe(outcome, caches[-1])
    progress("reading the text", len(outcomes), len(outcomes))

    total = len(reading.facts) * len(outcomes)
    for number, fact in enumerate(reading.facts):
        for done, index in enumerate(order.sample(range(len(outcomes)), len(outcomes))):
            progress("asking for the facts", number * len(outcomes) + done, total)
            bench.ask(outcomes[index], caches[index], fact)
    progress("asking for the facts", total, total)
    del caches

    done_rounds = 1
    for done_rounds in range(1, rounds + 1):
        spent = time.perf_counter() - began
        if done_rounds == rounds or spent + sum(o.median_first_token_s for o in outcomes) > TIME_BUDGET_S:
            break
        for done, index in enumerate(order.sample(range(len(outcomes)), len(outcomes))):
            progress(f"reading again, round {done_rounds + 1}", done, len(outcomes))
            bench.read(outcomes[index])
        progress(f"reading again, round {done_rounds + 1}", len(outcomes), len(outcomes))

    return Result(
        model_name=loaded.name,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device=str(loaded.model.device),
        threads=torch.get_num_threads(),
        lag_size=lag_size,
        sink_size=sink_size,
        layer_count=len(bench.new_cache(settings[0]).layers),
        full_layers=bench.full_layers,
        heads=bench.heads,
        weight_bytes=sum(x.numel() * x.element_size() for x in loaded.model.parameters()),
        reading=reading,
        outcomes=outcomes,
        rounds=done_rounds,
        always_kept=bench.always_kept(),
        seconds=time.perf_counter() - began,
    )


class _Bench:
    """The model, the text and the questions as tensors, and the things that are timed."""

    def __init__(self, loaded: LoadedModel, reading: Reading, lag_size: int, sink_size: int):
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.reading = reading
        self.lag_size, self.sink_size = lag_size, sink_size
        self.full_layers = full_attention_layers(self.model.config)
        self.ids = torch.tensor([reading.ids], device=self.model.device)
        self.heads = 0

    def check(self, settings: Sequence[Setting]) -> None:
        """Raises DemoError for what would fail later on."""
        for setting in settings:
            try:
                self.new_cache(setting)
            except (TypeError, ValueError) as error:
                raise DemoError(f"{setting.name} cannot be measured with this model: {error}") from error
        tokens, shortest = len(self.reading.ids), self.sink_size + 2 * self.lag_size
        if tokens < shortest:
            raise DemoError(
                f"the text has {tokens} tokens, and nothing is compressed below sink_size + 2 * lag_size = {shortest}"
            )
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        longest = max(len(self._question(f)) + len(self._answer(f)) for f in self.reading.facts)
        if limit is not None and tokens + longest > limit:
            raise DemoError(
                f"the text has {tokens} tokens and a question with its answer up to {longest}, but the model's "
                f"context is {limit} tokens long"
            )

    def always_kept(self) -> tuple[int, int]:
        """Leading and trailing tokens of the text that are not in a partition that loses any."""
        after = self.ids.shape[1] - self.sink_size
        return self.sink_size, after - (after // self.lag_size - 1) * self.lag_size

    def new_cache(self, setting: Setting) -> Any:
        from transformers import DynamicCache

        from lagkv_ext import LagKVCache

        if setting.score is None:
            return DynamicCache(config=self.model.config)
        if setting.given is not None:
            return LagKVCache(self.model.config, **setting.given)
        return LagKVCache(
            self.model.config,
            keep_ratio=setting.keep_ratio,
            lag_size=self.lag_size,
            sink_size=self.sink_size,
            **SCORING[setting.score],
        )

    def warm_up(self, settings: Sequence[Setting]) -> None:
        """Every code path once (the ratio leads to none), on as little of the text as gets compressed."""
        short = self.ids[:, : self.sink_size + 2 * self.lag_size]
        for setting in {setting.score: setting for setting in settings}.values():
            cache = self.new_cache(setting)
            token = self._likeliest(short, cache)
            self._likeliest(token, cache)

    def read(self, outcome: Outcome) -> Any:
        """The cache after the text; the time to the first token goes to ``outcome``."""
        cache = self.new_cache(outcome.setting)
        with self._timed(outcome.first_token_s):
            self._likeliest(self.ids, cache)
        if outcome.setting.score is not None:
            digest = cache.kept_hash()
            if outcome.kept_hash not in (None, digest):
                raise RuntimeError(f"{outcome.setting.name}: the same text left two different sets of tokens")
            outcome.kept_hash = digest
        return cache

    def describe(self, outcome: Outcome, cache: Any) -> None:
        """Sizes and kept tokens of a cache that has read the text. ``cache`` is not changed."""
        tokens = self.ids.shape[1]
        heads = [self._kept(cache, layer, tokens) for layer in self.full_layers]
        self.heads = heads[0].shape[0]
        outcome.kept = torch.cat(heads)
        answers = torch.cat([torch.arange(begin, end) for begin, end in self.reading.answer_spans])
        outcome.answer_tokens_kept = outcome.kept[:, answers].double().mean().item()
        leading, trailing = self.always_kept()
        middle = outcome.kept[:, leading : tokens - trailing].double().mean()
        chance = torch.where((answers < leading) | (answers >= tokens - trailing), 1.0, middle)
        outcome.answer_tokens_by_chance = chance.mean().item()
        # One token further: what a sliding-window layer of transformers holds after a prompt is a view on all of it.
        decoding = copy.deepcopy(cache)
        self._likeliest(self.ids[:, -1:], decoding)
        layer_bytes = _layer_bytes(decoding)
        outcome.full_layer_bytes = sum(layer_bytes[layer] for layer in self.full_layers)
        outcome.cache_bytes = sum(layer_bytes)
        outcome.tokens_seen = decoding.get_seq_length(self.full_layers[0])
        outcome.tokens_kept = statistics.mean(decoding.layers[i].keys.shape[2] for i in self.full_layers)
        if outcome.setting.score is not None:
            outcome.compressions = decoding.report().compressions

    def ask(self, outcome: Outcome, cache: Any, fact: Fact) -> None:
        """Asks on copies of the cache: once the model generates, once it is shown the answer token by token."""
        question, answer = self._question(fact), self._answer(fact)
        shown = self._likeliest([question + answer], copy.deepcopy(cache), last=len(answer) + 1)[
            0, :-1
        ].tolist()
        counted = [i for i, token in enumerate(answer) if self._text([token])]
        tokens_right = sum(shown[i] == answer[i] for i in counted)

        speaking = copy.deepcopy(cache)
        token = self._likeliest([question], speaking)
        said = [token]
        for _ in range(max(1, len(answer) - 1)):
            with self._timed(outcome.step_s):
                token = self._likeliest(token, speaking)
            said.append(token)
        text = self._text(torch.cat(said, dim=1)[0].tolist())
        right = text.casefold().startswith(fact.answer.casefold())
        outcome.answers.append(Answer(" ".join(text.split()), right, tokens_right, len(counted)))

    def _question(self, fact: Fact) -> list[int]:
        return self.tokenizer("\n\n" + fact.question, add_special_tokens=False)["input_ids"]

    def _answer(self, fact: Fact) -> list[int]:
        return self.tokenizer(" " + fact.answer, add_special_tokens=False)["input_ids"]

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens)).strip()

    def _likeliest(self, ids: Tensor | list[list[int]], cache: Any, last: int = 1) -> Tensor:
        """The most likely next token after each of the ``last`` last tokens of ``ids [1, n]``: ``[1, last]``."""
        from lagkv_ext.cache.keyword import cache_argument

        ids = torch.as_tensor(ids, device=self.model.device)
        with torch.inference_mode():
            logits = self.model(
                input_ids=ids, **cache_argument(cache, self.model), use_cache=True, logits_to_keep=last
            ).logits
            return logits[:, -last:].argmax(dim=-1)

    def _kept(self, cache: Any, layer: int, tokens: int) -> Tensor:
        """bool ``[H, N]``: which tokens of the text each head of a layer holds."""
        if not hasattr(cache, "kept_positions"):
            return torch.ones(cache.layers[layer].keys.shape[1], tokens, dtype=torch.bool)
        positions = cache.kept_positions(layer)[0].cpu().long()
        return torch.zeros(positions.shape[0], tokens, dtype=torch.bool).scatter_(1, positions, True)

    @contextmanager
    def _timed(self, times: list[float]) -> Iterator[None]:
        self._synchronize()
        began = time.perf_counter()
        yield
        self._synchronize()
        times.append(time.perf_counter() - began)

    def _synchronize(self) -> None:
        if self.model.device.type != "cpu":
            torch.accelerator.synchronize()


def _layer_bytes(cache: Any) -> list[int]:
    from lagkv_ext.cache.report import storage_bytes

    if hasattr(cache, "report"):
        return [layer.bytes_held for layer in cache.report().layers]
    return [
        storage_bytes(x for x in vars(layer).values() if isinstance(x, Tensor) and x.dim())
        for layer in cache.layers
    ]
