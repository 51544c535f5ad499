"""The version in force: the last good one of a rollout file that may change in any way, and which variants tripped."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lagkv_ext.serving.rollout.policy import Policy, RolloutError, read
from lagkv_ext.serving.rollout.store import Store, Trip, mounted_by_itself, now, target_of

_log = logging.getLogger(__name__)
T = TypeVar("T")
Signature = tuple[int, ...] | None
_STAYS = "the version in force stays"


@dataclass(frozen=True)
class Force:
    """Never changes, so that threads can read it without a lock."""

    policy: Policy
    trips: dict[str, Trip]  #: by variant; of those that tripped
    doubtful: frozenset[str]  #: variants whose record cannot be read, which counts as tripped

    def has_tripped(self, variant: str) -> bool:
        return variant in self.trips or variant in self.doubtful

    def may_recover(self, variant: str) -> bool:
        """Tells whether a variant that tripped may come back on checks of requests that got the full cache."""
        trip = self.trips.get(variant)
        known = trip is not None and trip.by != "errors" and variant not in self.doubtful
        return known and self.policy.guard.recover


class Watch:
    """Reads a rollout file and its trip records again where they changed. Not thread-safe: one look at a time.

    RolloutError when made: there is no file, or it cannot be used.
    """

    def __init__(self, store: Store, config: Any):
        self.store, self.config = store, config
        self.errors = 0  #: contents that could not be used
        self._seen: dict[Path, Signature] = {}
        self._told: dict[Path, object] = {}
        self._unusable: set[Path] = set()
        self._lost = False  # the symbolic links lead nowhere
        self._trips: dict[str, Trip] = {}  # the last one of each variant
        self._doubtful: set[str] = set()
        self._warn_of_mount()
        try:
            self._seen[store.path] = _signature(store.path)
            self._policy = self._good = read(store.path, config)
        except FileNotFoundError:
            raise RolloutError(
                f"there is no rollout file {store.path}; make one with: lagkv rollout init {store.path} "
                "--settings lagkv.json --share 0.01"
            ) from None
        except OSError as error:
            raise RolloutError(
                f"the rollout file {store.path} cannot be read: {error.strerror or error}"
            ) from error
        self._recall(self._good)

    @property
    def force(self) -> Force:
        # A record of a higher version: this file was put back by hand to an older one. Doubt means the full cache.
        names = self._good.variants
        trips = {
            name: trip
            for name, trip in self._trips.items()
            if name in names and trip.version >= self._good.version
        }
        return Force(self._policy, trips, frozenset(self._doubtful & set(names)))

    @property
    def unusable(self) -> bool:
        """Tells whether a file is there, as of the last look, that cannot be used."""
        return self._lost or bool(self._unusable)

    def look(self) -> Force:
        """Finds what is in force now. Never raises."""
        if not self._follow_links():
            return self.force
        path = self.store.path
        self._look_at(path, lambda: read(path, self.config), self._take, _STAYS)
        for name in self._good.variants:
            record = self.store.tripped(name)
            take = functools.partial(self._take_trip_record, name)
            read_it = functools.partial(self.store.trip, name)
            if not self._look_at(record, read_it, take, "it counts as tripped"):
                self._doubtful.add(name)
        return self.force

    def take_trip(self, trip: Trip) -> Force:
        """A trip stays for its version, also where its record vanishes."""
        known = self._trips.get(trip.variant)
        if known is None or trip.version > known.version:
            self._trips[trip.variant] = trip
        return self.force

    def _follow_links(self) -> bool:
        """Follow a symbolic link that leads to another file than at the last look. False where it leads nowhere."""
        name = self.store.name
        try:
            moved = target_of(name) != self.store.path
            store = self.store.again() if moved else self.store
        except OSError as error:
            self._tell(name, str(error), f"{name} cannot be read: {error.strerror}", _STAYS)
            self._lost = True
            return False
        self._lost = False
        if moved:
            _log.info("%s leads to %s from now on", name, store.path)
            self.store = store
            # Nothing is known of these files, even where they were followed before.
            self._seen.clear()
            self._unusable.clear()
            self._doubtful.clear()
            self._warn_of_mount()
        return True

    def _warn_of_mount(self) -> None:
        if mounted_by_itself(self.store.path):
            _log.error(
                "%s is mounted by itself: a version that lagkv rollout writes elsewhere, off too, is never seen here; "
                "mount its folder instead",
                self.store.path,
            )

    def _look_at(
        self, path: Path, read_it: Callable[[], T], take: Callable[[T | None], None], otherwise: str
    ) -> bool:
        """Read and take what changed, None where there is no file. False where that cannot be used, told once."""
        signature: Signature = None
        try:
            signature = _signature(path)  # before reading: a later change is seen by the next look
            if path in self._seen and self._seen[path] == signature:
                return path not in self._unusable
            take(None if signature is None else read_it())
            self._seen[path] = signature
            self._unusable.discard(path)
            return True
        except FileNotFoundError:
            take(None)  # gone since the stat
            self._unusable.discard(path)
            return True
        except OSError as error:
            self._seen.pop(path, None)  # may pass without a change of the file: try again
            self._tell(
                path, (signature, str(error)), f"{path} cannot be read: {error.strerror or error}", otherwise
            )
        except RolloutError as error:
            self._seen[path] = signature
            self._tell(path, signature, str(error), otherwise)
        self._unusable.add(path)
        return False

    def _tell(self, path: Path, what: object, message: str, otherwise: str) -> None:
        if self._told.get(path) != what:
            self._told[path] = what
            self.errors += 1
            _log.error("%s; %s", message, otherwise)

    def _take(self, found: Policy | None) -> None:
        if found is None:
            if self._policy.enabled:
                _log.warning("%s is gone: compression is off until it is back", self.store.path)
            self._policy = dataclasses.replace(self._policy, enabled=False)
        elif found.version > self._good.version or found == self._good:
            if found.version > self._good.version:
                _log.info("rollout version %d is in force", found.version)
                self._recall(found)
            self._policy = self._good = found
        elif not found.enabled:
            _log.warning(
                "%s says version %d, which is no later than %d, but switches off and is obeyed",
                self.store.path,
                found.version,
                self._good.version,
            )
            self._policy = dataclasses.replace(self._good, enabled=False)
        else:
            raise RolloutError(
                f"the rollout file {self.store.path} must have a version above {self._good.version}, which is in force "
                f"with other content, got {found.version}; write versions with: lagkv rollout"
            )

    def _recall(self, policy: Policy) -> None:
        """Trips of a version that comes into force: the history has them also where a record was deleted."""
        for name in policy.variants:
            try:
                trip = self.store.trip_of(policy.version, name)
            except RolloutError as error:  # there is one
                trip = Trip(policy.version, str(error), now(), os.getpid(), variant=name)
            except OSError as error:
                _log.warning(
                    "whether %s of version %d tripped cannot be read: %s", name, policy.version, error
                )
                continue
            if trip is not None:
                self._tell_trip(trip)
                self.take_trip(trip)

    def _take_trip_record(self, name: str, trip: Trip | None) -> None:
        self._doubtful.discard(name)
        if trip is not None:
            if trip.version >= self._good.version and trip != self._trips.get(name):
                self._tell_trip(trip)
            self.take_trip(trip)

    @staticmethod
    def _tell_trip(trip: Trip) -> None:
        _log.error(
            "variant %s of rollout version %d has tripped: %s", trip.variant, trip.version, trip.reason
        )


def _signature(path: Path) -> Signature:
    """Differs where a file was written or put in place; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
