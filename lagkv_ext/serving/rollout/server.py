"""``Rollout``: in a server, decides which cache each request gets, and falls back by itself."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lagkv_ext.serving.rollout.breaker import Breaker, Check
from lagkv_ext.serving.rollout.evidence import Evidence
from lagkv_ext.serving.rollout.policy import RolloutError, number
from lagkv_ext.serving.rollout.status import REASONS, RolloutStatus
from lagkv_ext.serving.rollout.store import Store, Trip, now
from lagkv_ext.serving.rollout.watch import Force, Watch

_log = logging.getLogger(__name__)
# That a server waits for others that write: what it could not write is tried again at the next look.
_PATIENCE_S = 0.1


@dataclass(frozen=True)
class Decision:
    """What one request gets."""

    cache: (
        Any  #: an empty `LagKVCache`, or an empty `DynamicCache`: give it to the model as ``past_key_values``
    )
    compressed: bool
    reason: str  #: one of `REASONS`
    version: int  #: of the rollout file
    wants_check: (
        bool  #: whether this request is one of those to be checked: hand its tokens to `Rollout.check`
    )


class Rollout:
    """Gives every request of a server its cache by the rollout file ``path``, which may change at any time.

    Make one in each worker process, after it was forked, and use it from any thread. Any doubt means the full cache.

    Args:
        path: the rollout file, made by ``lagkv rollout init``. Its folder must be writable for trips and checks to
            be seen by other processes; where it is not, that is logged, and a trip holds in this process.
        config: ``model.config``; the settings of every version are tried with it when they are read.
        reload_s: the file is looked at again by the first request after so many seconds (one ``stat``; it is read
            where that differs). 0: by every request.

    Raises:
        RolloutError: when made: no file, or one that cannot be used. Never afterwards.
        TypeError, ValueError: ``config`` is none, or ``reload_s`` is negative.

    While it runs:

    - A file that cannot be read or used, or whose version does not grow, changes nothing: the last good version stays
      in force. It is logged at ERROR and counted in ``reload_errors``, once for each content. But a file that is valid
      and says ``"enabled": false`` is obeyed whatever its version, and whether its settings fit the model or not.
    - A file that is gone means disabled, until it is back. A trip record that cannot be read means tripped.
    - A version that tripped stays so until there is a higher one.
    """

    def __init__(self, path: str | Path, config: Any, *, reload_s: float = 1.0):
        number("reload_s", reload_s, 0, float("inf"))
        self._config, self._reload_s = config, reload_s
        self._watch = Watch(_store(path), config)
        self._looking = threading.Lock()  # held by the one thread that looks at the files
        self._counting = threading.Lock()
        self._decisions: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self._checks = self._check_errors = self._failures = 0
        self._unsaved: Trip | None = None  # a trip that could not be written yet
        self._told: dict[str, str] = {}
        self._breaker: Breaker
        self._evidence: Evidence
        self._begin(self._watch.force)
        self._look()

    # -- requests

    def cache(self, *, request_id: str, prompt_tokens: int) -> Decision:
        """The cache of one request. ``request_id`` decides, by a stable hash, on which side of ``share`` it falls: for
        a conversation that must stay on one side give the conversation's id. ``prompt_tokens``: length of the prompt.

        Never raises where a `DynamicCache` can be made: what goes wrong, a wrong argument too, gives the full cache
        with the reason "error", is logged with its traceback, and counts towards ``guard.max_errors``.
        """
        compressed = None
        force = self._force
        try:
            self._look_if_due()
            force = self._force
            reason = self._reason(force, request_id, prompt_tokens)
            wants_check = force.policy.checks(request_id)
            if reason == "compressed":
                from lagkv_ext import LagKVCache

                compressed = LagKVCache(self._config, **force.policy.settings)
        except Exception:
            reason = "error"
            _log.exception(
                "no compressed cache could be made for request %r: it gets the full one", request_id
            )
            self._failed(force)
        with self._counting:
            self._decisions[reason] += 1
        version = force.policy.version
        if compressed is not None:
            return Decision(compressed, True, reason, version, wants_check)
        from transformers import DynamicCache

        return Decision(DynamicCache(config=self._config), False, reason, version, False)

    @staticmethod
    def _reason(force: Force, request_id: str, prompt_tokens: int) -> str:
        if not force.policy.enabled:
            return "disabled"
        if force.tripped:
            return "tripped"
        if not force.policy.selects(request_id):
            return "share"
        return "short_prompt" if prompt_tokens < force.policy.min_prompt_tokens else "compressed"

    def failed(self, decision: Decision) -> None:
        """Say that generation with ``decision.cache`` raised, which counts towards ``guard.max_errors``; then run the
        request again with a `DynamicCache`. Nothing happens where the cache was a full one; one of an earlier version
        is counted, and says nothing about the version in force.
        """
        force = self._force
        if decision.compressed:
            with self._counting:
                self._failures += 1
            if decision.version == force.policy.version:
                self._failed(force)

    # -- quality

    def check(
        self,
        model: Any,
        input_ids: Tensor,
        output_ids: Tensor,
        *,
        version: int | None = None,
        prefill_chunk_size: int | None = None,
    ) -> Check | None:
        """Replay a compressed request with both caches (`replay`: arguments, cost), and let the breaker judge.

        Call it outside of the request, from a worker thread or a queue, for decisions with ``wants_check``.
        ``version``: of the decision; None: the version in force.

        A request of which no token was said with anything dropped tells nothing about compression, and would hide those
        that do: its check is returned, and does not count. So with one that is too short, and with an answer of one
        token, which comes from the prompt before its rows are dropped.

        Returns None, and does nothing, for a version that is not in force any more, is disabled, or has tripped; also
        where the check failed, which is logged, and counts in ``check_errors`` and towards ``guard.max_errors``. Never
        raises.
        """
        force = self._force
        try:
            self._look_if_due()
            force = self._force
            if version not in (None, force.policy.version) or not force.policy.enabled or force.tripped:
                return None
            from lagkv_ext.serving.rollout.check import replay

            result = replay(
                model, input_ids, output_ids, force.policy.settings, prefill_chunk_size=prefill_chunk_size
            )
        except Exception:
            _log.exception("a quality check failed")
            with self._counting:
                self._check_errors += 1
            self._failed(force)
            return None
        if not result.compressed:
            return result
        with self._looking:
            self._checks += 1
            if force.policy.version == self._force.policy.version:
                self._take(result)
        return result

    def _take(self, result: Check) -> None:
        try:
            self._evidence.append(result)
        except OSError as error:
            self._tell_once("a check could not be shared with other processes", error)
            self._judge([result])
        self._read_evidence()

    def _read_evidence(self) -> None:
        try:
            checks = self._evidence.new()
        except OSError as error:
            self._tell_once("the checks of other processes cannot be read", error)
            return
        if not self._breaker.checks:  # what there is when this process begins with a version
            self._breaker.recall(checks[:-1])
            checks = checks[-1:]
        self._judge(checks)

    def _judge(self, checks: list[Check]) -> None:
        for check in checks:
            if (reason := self._breaker.add(check)) is not None and not self._force.tripped:
                self._trip(self._force, reason)

    def _failed(self, force: Force) -> None:
        """Something about compression failed under this version."""
        limit = force.policy.guard.max_errors
        with self._counting:
            if force.policy.version != self._force.policy.version:
                return
            self._errors += 1
            over = limit is not None and self._errors == limit
        if over:
            with self._looking:
                if not self._force.tripped and force.policy.version == self._force.policy.version:
                    self._trip(force, f"{limit} requests or checks failed in one process (guard.max_errors)")

    def _trip(self, force: Force, reason: str) -> None:
        breaker, version = self._breaker, force.policy.version
        kl = breaker.kl if breaker.kl is not None and breaker.kl < float("inf") else None
        trip = Trip(version, reason, now(), os.getpid(), breaker.checks, breaker.agreement, kl)
        _log.error("rollout version %d has tripped, every request gets the full cache: %s", version, reason)
        self._force = self._watch.take_trip(trip)  # first here, then for others
        self._unsaved = trip
        self._save_trip()

    def _save_trip(self) -> None:
        if self._unsaved is None:
            return
        try:
            self._watch.store.record_trip(self._unsaved)
            self._unsaved = None
        except OSError as error:
            self._tell_once("the trip could not be written, only this process has fallen back so far", error)

    def _tell_once(self, what: str, error: OSError) -> None:
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
        store = self._watch.store
        force = self._watch.look()
        if force.policy.version != self._force.policy.version:
            self._begin(force)
        elif self._watch.store is not store:  # a link leads to the same version in another folder
            self._evidence = self._evidence_of(force)
        self._force = force
        self._read_evidence()
        self._save_trip()

    def _begin(self, force: Force) -> None:
        """A version comes into force: earlier checks and failures say nothing about it."""
        with self._counting:
            self._force = force
            self._errors = 0
        self._breaker = Breaker(force.policy.guard)
        self._evidence = self._evidence_of(force)

    def _evidence_of(self, force: Force) -> Evidence:
        return Evidence(self._watch.store.checks_of(force.policy.version), force.policy.guard.window)

    # -- what others see

    def status(self) -> RolloutStatus:
        """How things are. Looks at the file where that is due, so that a server without requests knows too."""
        self._look_if_due()
        with self._looking, self._counting:
            return RolloutStatus(
                version=self._force.policy.version,
                enabled=self._force.policy.enabled,
                share=self._force.policy.share,
                tripped=self._force.tripped,
                decisions=dict(self._decisions),
                checks=self._checks,
                agreement=self._breaker.agreement,
                kl=self._breaker.kl,
                check_errors=self._check_errors,
                failures=self._failures,
                unusable=self._watch.unusable,
                reload_errors=self._watch.errors,
            )


def _store(path: str | Path) -> Store:
    try:
        return Store(path, patience_s=_PATIENCE_S)
    except OSError as error:
        raise RolloutError(f"the rollout file {path} cannot be read: {error.strerror}") from error


__all__ = ["Decision", "Rollout", "RolloutError"]
