"""``Rollout``: decides in a server which cache each request gets, and falls back by itself."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lagkv_ext.serving.rollout import adapt
from lagkv_ext.serving.rollout.evidence import Evidence
from lagkv_ext.serving.rollout.judge import Check, Judge
from lagkv_ext.serving.rollout.policy import FULL, RolloutError, number, rung_of
from lagkv_ext.serving.rollout.samples import Sample, SampleFolder, generate_both, redacted
from lagkv_ext.serving.rollout.status import REASONS, RolloutStatus, VariantStatus
from lagkv_ext.serving.rollout.store import Store, Trip, now
from lagkv_ext.serving.rollout.watch import Force, Watch

_log = logging.getLogger(__name__)
# Seconds that a server waits for others that write: what it could not write is tried again at the next look.
_PATIENCE_S = 0.1
# Without new checks the ladder is looked at this often: what holds a move back ends with time alone.
_LADDER_S = 60.0


@dataclass(frozen=True)
class Decision:
    """The cache of one request, and why."""

    #: An empty `LagKVCache`, or an empty `DynamicCache`: give it to the model as ``cache``. None from `Rollout.route`.
    cache: Any
    compressed: bool
    reason: str  #: one of `REASONS`
    version: int  #: of the rollout file
    wants_check: bool  #: whether this request is to be checked: give its tokens to `Rollout.check`
    variant: str = FULL  #: by the request's id, whatever cache it got
    settings: Mapping[str, Any] | None = field(
        default=None, hash=False
    )  #: of the compressed cache; None: full
    request_id: str = ""
    prompt_tokens: int | None = None
    eligible: bool = False  #: whether the prompt is long enough to be compressed, whatever the variant
    wants_sample: bool = (
        False  #: whether answers to this request are to be stored: give it to `Rollout.sample`
    )


class Rollout:
    """Gives every request of a server its cache by the rollout file ``path``, which may change at any time.

    Make one in each worker process, after it was forked, and use it from any thread. In doubt a request gets the full
    cache.

    Args:
        path: the rollout file, made by ``lagkv rollout init``. Its folder must be writable, so that other processes
            see trips and checks; where it is not, that is logged, and a trip holds in this process.
        config: ``model.config``; the settings of every version are tried with it when they are read.
        redact: applied to prompts and answers before they are stored as samples; None: they are stored as they are.
        reload_s: the first request after so many seconds looks at the file again (one ``stat``; it is read where that
            differs). 0: every request does.

    Raises:
        RolloutError: when made: no file, or one that cannot be used. Never afterwards.
        TypeError, ValueError: ``config`` is none, or ``reload_s`` is negative.

    While it runs:

    - A file that cannot be read or used, or whose version does not grow, changes nothing: the last good version stays
      in force. It is logged at ERROR and counted in ``reload_errors``, once for each content. But a file that is valid
      and says ``"enabled": false`` is obeyed whatever its version, and whether its settings fit the model or not.
    - A file that is gone means disabled, until it is back. A trip record that cannot be read means tripped.
    - A variant that tripped stays so until there is a higher version; with ``guard.recover`` the servers write that
      version themselves, once checks show that the variant may come back. They also write the moves of a ladder.
    """

    def __init__(
        self,
        path: str | Path,
        config: Any,
        *,
        redact: Callable[[str], str] | None = None,
        reload_s: float = 1.0,
    ):
        number("reload_s", reload_s, 0, float("inf"))
        self._config, self._reload_s, self._redact = config, reload_s, redact
        self._watch = Watch(_store(path), config)
        self._looking = threading.Lock()  # held by the one thread that looks at the files
        self._counting = threading.Lock()
        self._decisions: Counter[tuple[str, str]] = Counter()
        self._checks: Counter[str] = Counter()
        self._check_errors = self._failures = 0
        self._unsaved: dict[str, Trip] = {}  # trips that could not be written yet
        self._told: dict[str, str] = {}
        self._errors: Counter[str] = Counter()  # of this version, by variant; "" where none was chosen yet
        self._force: Force
        self._judges: dict[str, Judge]
        self._evidence: Evidence
        self._next_ladder = 0.0
        self._begin(self._watch.force)
        self._look()

    # -- requests

    def cache(self, *, request_id: str, prompt_tokens: int) -> Decision:
        """The cache of one request. ``request_id`` decides by a stable hash which variant it gets: for a conversation
        that must keep its variant give the conversation's id. ``prompt_tokens``: length of the prompt.

        Never raises where a `DynamicCache` can be made: whatever goes wrong, a wrong argument too, gives the full cache
        with the reason "error", is logged with its traceback, and counts towards ``guard.max_errors``.
        """

        def made(settings: Mapping[str, Any]) -> Any:
            from lagkv_ext import LagKVCache

            return LagKVCache(self._config, **settings)

        decision = self._decide(request_id, prompt_tokens, made)
        if decision.cache is not None:
            return decision
        from transformers import DynamicCache

        return dataclasses.replace(decision, cache=DynamicCache(config=self._config))

    def route(self, *, request_id: str, prompt_tokens: int) -> Decision:
        """`cache` for an engine that holds the caches itself, as vLLM does: decides, and makes no cache.

        Where ``compressed``, send the request to the deployment with ``settings``; else to that with the full cache.
        ``Decision.cache`` is None. Never raises; in doubt the full cache, as `cache`.
        """
        return self._decide(request_id, prompt_tokens, None)

    def _decide(
        self, request_id: str, prompt_tokens: int, make: Callable[[Mapping[str, Any]], Any] | None
    ) -> Decision:
        """A decision with the cache that ``make`` makes of the settings, and with None for a full one."""
        cache: Any = None
        settings, variant, eligible, wants_check = None, FULL, False, False
        force = self._force
        try:
            self._look_if_due()
            force = self._force
            policy = force.policy
            variant = policy.variant_of(request_id)
            eligible = prompt_tokens >= policy.min_prompt_tokens
            reason = self._reason(force, variant, eligible)
            if reason == "compressed" or (reason == "tripped" and force.may_recover(variant)):
                wants_check = policy.checks(request_id)
            if reason == "compressed":
                settings = policy.variants[variant].settings
                cache = make(settings) if make is not None else None
        except Exception:
            reason, settings, wants_check = "error", None, False
            _log.exception(
                "no compressed cache could be given to request %r: it gets the full one", request_id
            )
            self._failed(force, variant if variant != FULL else "")
        with self._counting:
            self._decisions[variant, reason] += 1
        compressed = settings is not None
        return Decision(
            cache,
            compressed,
            reason,
            force.policy.version,
            wants_check,
            variant,
            settings,
            request_id,
            prompt_tokens,
            eligible,
            compressed and force.policy.is_sampled(request_id),
        )

    @staticmethod
    def _reason(force: Force, variant: str, eligible: bool) -> str:
        if not force.policy.enabled:
            return "disabled"
        if variant == FULL:
            return "share"
        if force.has_tripped(variant):
            return "tripped"
        return "compressed" if eligible else "short_prompt"

    def failed(self, decision: Decision) -> None:
        """Tell that generation with ``decision.cache`` raised, which counts towards ``guard.max_errors``; then run the
        request again with a `DynamicCache`. Nothing happens where the cache was a full one; one of an earlier version
        is counted, and says nothing about the version in force.
        """
        force = self._force
        if decision.compressed:
            with self._counting:
                self._failures += 1
            if decision.version == force.policy.version:
                self._failed(force, decision.variant)

    # -- quality

    def check(
        self,
        model: Any,
        input_ids: Tensor,
        output_ids: Tensor,
        *,
        version: int | None = None,
        variant: str | None = None,
        prefill_chunk_size: int | None = None,
    ) -> Check | None:
        """Replays a request with both caches (`replay`: arguments, cost), and judges the variant by it.

        Call it outside of the request, from a worker thread or a queue, for decisions with ``wants_check``.
        ``version``, ``variant``: of the decision; None: the version in force, and its only variant.

        A request whose tokens were all generated before any row was dropped does not count; it would mask real
        regressions. Its check is returned. That happens where the prompt is too short, and for an answer of one token.

        Returns None, and does nothing, for a version that is no longer in force or is disabled, and for a variant that
        has tripped, unless checks may bring it back. Also where the check failed, which is logged, and counts in
        ``check_errors`` and towards ``guard.max_errors``. Never raises.
        """
        force = self._force
        try:
            self._look_if_due()
            force = self._force
            policy = force.policy
            if version not in (None, policy.version) or not policy.enabled:
                return None
            name = self._only_variant(force) if variant is None else variant
            shadow = force.has_tripped(name)
            if name not in policy.variants or (shadow and not force.may_recover(name)):
                return None
            from lagkv_ext.serving.rollout.check import replay

            settings = policy.variants[name].settings
            result = replay(model, input_ids, output_ids, settings, prefill_chunk_size=prefill_chunk_size)
        except Exception:
            _log.exception("a quality check failed")
            with self._counting:
                self._check_errors += 1
            self._failed(force, variant or "")
            return None
        result = dataclasses.replace(result, variant=name, shadow=shadow)
        self._count_check(force, result)
        return result

    def add_check(self, check: Check, *, version: int, variant: str) -> bool:
        """Judges ``variant`` by a check that was measured elsewhere, as by `lagkv_ext.vllm.check.check_deployments`.

        ``version``, ``variant``: of the decision. Whether it counts: not for another version than that in force, or
        a disabled one, a variant that has tripped and is not to recover, and a check without anything compressed.

        Raises TypeError for what is no `Check`, and nothing else.
        """
        if not isinstance(check, Check):
            raise TypeError(f"check must be a Check, got {type(check).__name__}")
        self._look_if_due()
        force = self._force
        policy = force.policy
        shadow = force.has_tripped(variant)
        known = variant in policy.variants and (not shadow or force.may_recover(variant))
        if version != policy.version or not policy.enabled or not known:
            return False
        return self._count_check(force, dataclasses.replace(check, variant=variant, shadow=shadow))

    def _count_check(self, force: Force, check: Check) -> bool:
        if not check.compressed:
            return False
        with self._looking:
            self._checks[check.variant] += 1
            if force.policy.version == self._force.policy.version:
                self._take(check)
        return True

    def sample(
        self,
        model: Any,
        tokenizer: Any,
        input_ids: Tensor,
        *,
        version: int,
        variant: str,
        max_new_tokens: int = 256,
    ) -> bool:
        """Stores the answers to one prompt ``[1, N]`` for review, generated anew with both caches. Whether it did.

        Call it outside of the request, for decisions with ``wants_sample``. It costs both generations. Nothing is
        stored where the version is no longer in force or stores no samples, where the folder has as many as it may, or
        where anything failed, which is logged. Never raises.
        """

        def made(settings: Mapping[str, Any]) -> tuple[tuple[str, str, str], int]:
            texts = generate_both(model, tokenizer, input_ids, settings, max_new_tokens)
            return texts, input_ids.shape[1]

        return self._sample(made, version, variant)

    def add_sample(
        self, prompt: str, full: str, compressed: str, *, prompt_tokens: int, version: int, variant: str
    ) -> bool:
        """Stores two answers that were generated elsewhere, as by two deployments of vLLM. All else as in `sample`."""
        return self._sample(lambda settings: ((prompt, full, compressed), prompt_tokens), version, variant)

    def _sample(
        self,
        make: Callable[[Mapping[str, Any]], tuple[tuple[str, str, str], int]],
        version: int,
        variant: str,
    ) -> bool:
        policy = self._force.policy
        if policy.version != version or policy.samples is None or variant not in policy.variants:
            return False
        folder = SampleFolder(self._watch.store, policy.samples)
        settings = policy.variants[variant].settings
        try:
            if folder.is_full():
                return False
            texts, tokens = make(settings)
            made = Sample(now(), version, variant, dict(settings), *redacted(texts, self._redact), tokens)
            return folder.add(made) is not None
        except OSError as error:
            self._tell_once("a sample could not be stored", error)
        except Exception:
            _log.exception("a sample could not be made")
        return False

    @staticmethod
    def _only_variant(force: Force) -> str:
        names = list(force.policy.variants)
        if len(names) != 1:
            raise ValueError(f"variant must be given where there are several: {', '.join(names)}")
        return names[0]

    def _take(self, result: Check) -> None:
        try:
            self._evidence.append(result)
        except OSError as error:
            self._tell_once("a check could not be shared with other processes", error)
            self._judges[result.variant].add(result)
        self._settle()

    def _settle(self) -> None:
        """Read new checks, and do what they ask for, until they ask for nothing more."""
        self._read_evidence()
        while self._move():
            self._follow()
            self._read_evidence()

    def _read_evidence(self) -> None:
        try:
            checks = self._evidence.new()
        except OSError as error:
            self._tell_once("the checks of other processes cannot be read", error)
            checks = []
        for check in checks:
            if check.variant in self._judges:
                self._judges[check.variant].add(check)
        if checks:
            self._next_ladder = 0.0
        for name, judge in self._judges.items():
            if not self._force.has_tripped(name) and (reason := judge.trip_reason()) is not None:
                self._trip(name, reason, "checks")

    def _move(self) -> bool:
        """Write a version that the checks ask for. Whether there is another one now."""
        if time.monotonic() < self._next_ladder:
            return False
        self._next_ladder = time.monotonic() + _LADDER_S
        store, force = self._watch.store, self._force
        move = None
        try:
            if self._unsaved:  # else the new version would forget these trips
                return False
            move = adapt.next_move(store, force, self._judges)
            if move is None:
                return False
            self._try(move.settings)
            adapt.write(store, force.policy, move)
            _log.warning("rollout version %d: %s", force.policy.version + 1, move.why)
            return True
        except adapt.Overtaken:
            return True
        except (OSError, RolloutError) as error:
            self._next_ladder = 0.0  # try again at the next look
            self._tell_once("a version that checks ask for could not be written", error)
            if move is not None and move.larger and not force.has_tripped(move.variant):
                self._trip(move.variant, f"{move.why}, which could not be written: {error}", "checks")
            return False

    def _try(self, settings: Mapping[str, Any]) -> None:
        """RolloutError where the model's cache does not take settings."""
        from lagkv_ext import LagKVCache

        try:
            LagKVCache(self._config, **settings)
        except Exception as error:
            raise RolloutError(f"settings {dict(settings)!r}: {error}") from error

    def _failed(self, force: Force, variant: str) -> None:
        """Compression failed under this version, of one variant or before one was chosen."""
        limit = force.policy.guard.max_errors
        with self._counting:
            if force.policy.version != self._force.policy.version:
                return
            self._errors[variant] += 1
            over = limit is not None and self._errors[variant] == limit
        if over:
            with self._looking:
                if force.policy.version == self._force.policy.version:
                    for name in [variant] if variant else force.policy.variants:
                        if not self._force.has_tripped(name):
                            why = f"{limit} requests or checks failed in one process (guard.max_errors)"
                            self._trip(name, why, "errors")

    def _trip(self, name: str, reason: str, by: str) -> None:
        judge, version = self._judges[name], self._force.policy.version
        kl = judge.kl if judge.kl is not None and judge.kl < float("inf") else None
        trip = Trip(version, reason, now(), os.getpid(), judge.checks, judge.agreement, kl, name, by)
        _log.error(
            "variant %s of rollout version %d has tripped, its requests get the full cache: %s",
            name,
            version,
            reason,
        )
        self._force = self._watch.take_trip(trip)  # first here, then for others
        self._unsaved[name] = trip
        self._save_trips()

    def _save_trips(self) -> None:
        for name, trip in list(self._unsaved.items()):
            try:
                self._watch.store.record_trip(trip)
                del self._unsaved[name]
            except OSError as error:
                self._tell_once(
                    "the trip could not be written, only this process has fallen back so far", error
                )

    def _tell_once(self, what: str, error: Exception) -> None:
        # It is tried again with every look, and the log is for people.
        if self._told.get(what) != str(error):
            self._told[what] = str(error)
            _log.error("%s: %s", what, error)

    # -- the file

    def reload(self) -> None:
        """Look at the files now, whatever ``reload_s`` says."""
        with self._looking:
            self._look()

    def _look_if_due(self) -> None:
        # A request never waits for another one's look at the files.
        if time.monotonic() >= self._next_look and self._looking.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._looking.release()

    def _look(self) -> None:
        self._next_look = time.monotonic() + self._reload_s
        self._follow()
        self._settle()
        self._save_trips()

    def _follow(self) -> None:
        """Follows what the files say now."""
        store = self._watch.store
        force = self._watch.look()
        if force.policy.version != self._force.policy.version:
            self._begin(force)
        elif self._watch.store is not store:  # a link leads to the same version in another folder
            self._evidence = self._evidence_of(force)
        self._force = force

    def _begin(self, force: Force) -> None:
        """A version comes into force: earlier checks and failures say nothing about it."""
        policy = force.policy
        with self._counting:
            self._force = force
            self._errors.clear()
        target = policy.ladder
        self._judges = {
            name: Judge(policy.guard, target.target_agreement if target and target.variant == name else None)
            for name in policy.variants
        }
        self._evidence = self._evidence_of(force)
        self._next_ladder = 0.0

    def _evidence_of(self, force: Force) -> Evidence:
        return Evidence(self._watch.store.checks_of(force.policy.version))

    # -- what others see

    def status(self) -> RolloutStatus:
        """Reports the state of the rollout. Looks at the file where that is due, also in a server without requests."""
        self._look_if_due()
        reviews = self._reviews()
        with self._looking, self._counting:
            policy = self._force.policy
            counted = [name for name, _ in self._decisions if name not in policy.variants]
            names = dict.fromkeys([*policy.variants, FULL, *counted])
            return RolloutStatus(
                version=policy.version,
                enabled=policy.enabled,
                variants={name: self._status_of(name, *reviews.get(name, (0, {}))) for name in names},
                check_errors=self._check_errors,
                failures=self._failures,
                unusable=self._watch.unusable,
                reload_errors=self._watch.errors,
            )

    def _reviews(self) -> dict[str, tuple[int, dict[str, int]]]:
        policy = self._force.policy
        if policy.samples is None:
            return {}
        try:
            return SampleFolder(self._watch.store, policy.samples).counts()
        except OSError as error:
            self._tell_once("samples and verdicts cannot be read", error)
            return {}

    def _status_of(self, name: str, samples: int, reviews: dict[str, int]) -> VariantStatus:
        policy = self._force.policy
        decisions = {reason: self._decisions[name, reason] for reason in REASONS}
        if name not in policy.variants:
            share = max(1 - policy.share, 0.0) if name == FULL else 0.0
            return VariantStatus(share, False, decisions, self._checks[name], None, None, None, None)
        judge = self._judges[name]
        low, high = judge.bounds or (None, None)
        ladder = policy.ladder
        return VariantStatus(
            share=policy.variants[name].share,
            tripped=self._force.has_tripped(name),
            decisions=decisions,
            checks=self._checks[name],
            agreement=judge.agreement,
            agreement_at_least=low,
            agreement_at_most=high,
            kl=judge.kl,
            rung=rung_of(policy) if ladder is not None and ladder.variant == name else None,
            samples=samples,
            reviews=reviews,
        )


def _store(path: str | Path) -> Store:
    try:
        return Store(path, patience_s=_PATIENCE_S)
    except OSError as error:
        raise RolloutError(f"the rollout file {path} cannot be read: {error.strerror}") from error


__all__ = ["Decision", "Rollout", "RolloutError"]
