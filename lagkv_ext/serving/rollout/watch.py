"""What is in force: the last good version of a rollout file that anything may happen to, and whether it tripped."""

from __future__ import annotations

import dataclasses
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
    tripped: bool


class Watch:
    """Reads a rollout file and its trip record again where they changed. Not thread-safe: one look at a time.

    RolloutError when made: there is no file, or it cannot be used.
    """

    def __init__(self, store: Store, config: Any):
        self.store, self.config = store, config
        self.errors = 0  #: contents that could not be used
        self._seen: dict[Path, Signature] = {}
        self._told: dict[Path, object] = {}
        self._unusable: set[Path] = set()
        self._lost = False  # the symbolic links lead nowhere
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
        self._trip: Trip | None = None
        self._doubt = False  # there is a trip record that cannot be read
        self._recall(self._good)

    @property
    def force(self) -> Force:
        trip = self._trip
        # A record of a higher version: this file was put back by hand to what is older. Doubt means the full cache.
        tripped = self._doubt or (trip is not None and trip.version >= self._good.version)
        return Force(self._policy, tripped)

    @property
    def unusable(self) -> bool:
        """Whether a file is there, as of the last look, that cannot be used."""
        return self._lost or bool(self._unusable)

    def look(self) -> Force:
        """What is in force now. Never raises."""
        if not self._follow_links():
            return self.force
        path = self.store.path
        self._look_at(path, lambda: read(path, self.config), self._take, _STAYS)
        record = self.store.tripped
        if not self._look_at(record, self.store.trip, self._take_trip_record, "it counts as tripped"):
            self._doubt = True
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
            self._warn_of_mount()
        return True

    def _warn_of_mount(self) -> None:
        if mounted_by_itself(self.store.path):
            _log.error(
                "%s is mounted by itself: a version that lagkv rollout writes elsewhere, off too, is never seen here; "
                "mount its folder instead",
                self.store.path,
            )

    def take_trip(self, trip: Trip) -> Force:
        """A trip stays for its version, also where its record vanishes."""
        if self._trip is None or trip.version > self._trip.version:
            self._trip = trip
        return self.force

    def _look_at(
        self, path: Path, read_it: Callable[[], T], take: Callable[[T | None], None], otherwise: str
    ) -> bool:
        """Read and take what changed, None where there is no file. False where that cannot be used, told once."""
        signature: Signature = None
        try:
            signature = _signature(path)  # before reading: what comes later is seen by the next look
            if path in self._seen and self._seen[path] == signature:
                return True
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
        """A trip of a version that comes into force: the history has it also where the record was deleted."""
        try:
            trip = self.store.trip_of(policy.version)
        except RolloutError as error:  # there is one
            trip = Trip(policy.version, str(error), now(), os.getpid())
        except OSError as error:
            _log.warning("whether version %d tripped cannot be read: %s", policy.version, error)
            return
        if trip is not None:
            _log.error("rollout version %d has tripped: %s", trip.version, trip.reason)
            self.take_trip(trip)

    def _take_trip_record(self, trip: Trip | None) -> None:
        self._doubt = False
        if trip is not None:
            if trip.version >= self._good.version and trip != self._trip:
                _log.error("rollout version %d has tripped: %s", trip.version, trip.reason)
            self.take_trip(trip)


def _signature(path: Path) -> Signature:
    """Differs where a file was written or put in place; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
