"""Stores the rollout file, its history and the record of a trip: complete files only, and versions that only grow.

Beside ``lagkv-rollout.json``, the version in force:

- ``lagkv-rollout.history/000003.json``: every version, never changed; ``000003.tripped.json`` where it tripped,
  ``000003.tripped.NAME.json`` where another variant than the main one did.
- ``lagkv-rollout.tripped.json`` and ``lagkv-rollout.tripped.NAME.json``: the version in which a variant tripped, for
  all processes; later versions ignore them.
- ``lagkv-rollout.checks/000003.jsonl``: the quality checks of a version (`evidence`).
- ``lagkv-rollout.lock``: held (flock) while something is written; the system frees it when a process dies.

Where the path is a symbolic link, all of these lie beside the file that it leads to: everybody who means the same file
shares one history, one trip and one lock, by whatever name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from lagkv_ext import arguments
from lagkv_ext.serving.rollout.policy import MAIN, Policy, RolloutError, integer, read, read_object, text_of

DOUBT = 2**62  # above every version
_NUMBERED = re.compile(r"(\d{6,})\.")
_VERSION = re.compile(r"(\d{6,})\.json")


@dataclass(frozen=True)
class Trip:
    """Why a variant fell back to the full cache in one version."""

    version: int
    reason: str
    time: str  #: ISO 8601, UTC
    pid: int  #: of the process that found out
    checks: int = 0
    agreement: float | None = None
    kl: float | None = None  #: nats per token; None also where it was infinite
    variant: str = MAIN
    by: str = (
        "checks"  #: "checks", "errors" or "probation": after a trip, a ladder tries a larger cache unseen
    )


def now() -> str:
    """The time as records name it (`stamp`)."""
    return stamp(time.time())


def stamp(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601, UTC, seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


class Store:
    """Reads and writes the rollout file at ``name``, a path that may be a symbolic link. ``path`` is the file that it
    leads to when the store is made.

    Writing is safe among threads and processes: one writes after the other. TimeoutError (an OSError): another writer
    did not finish within ``patience_s``.

    Raises OSError: the symbolic links lead nowhere.
    """

    def __init__(self, name: str | Path, *, patience_s: float = 30.0):
        self.name, self._patience_s = Path(arguments.path("name", name)), patience_s
        self.path = target_of(self.name)
        self.history = self._beside(".history")
        self.checks = self._beside(".checks")

    def again(self) -> Store:
        """The store at the same name, whose symbolic links may lead elsewhere by now. Raises OSError."""
        return Store(self.name, patience_s=self._patience_s)

    def _beside(self, ending: str) -> Path:
        return self.path.with_name(self.path.name.removesuffix(".json") + ending)

    # -- reading

    def current(self) -> Policy | None:
        """The version in the file, None where there is no file. RolloutError where it cannot be used."""
        try:
            return read(self.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RolloutError(
                f"the rollout file {self.path} cannot be read: {error.strerror or error}"
            ) from error

    def versions(self) -> list[int]:
        """Numbers of all versions in the history, ascending."""
        names = [x.name for x in self.history.iterdir()] if self.history.is_dir() else []
        return sorted(int(found[1]) for name in names if (found := _VERSION.fullmatch(name)))

    def version(self, number: int) -> Policy:
        """A version from the history. RolloutError where there is none, or it cannot be used."""
        try:
            return read(self._kept(number))
        except OSError as error:
            known = ", ".join(map(str, self.versions())) or "none"
            raise RolloutError(f"there is no version {number} of {self.path}; known: {known}") from error

    def written(self, number: int) -> float:
        """When a version of the history was written, seconds since the epoch."""
        return self._kept(number).stat().st_mtime

    def checks_of(self, number: int) -> Path:
        """Path of the quality checks of a version (`evidence`)."""
        return self.checks / f"{number:06}.jsonl"

    def tripped(self, variant: str = MAIN) -> Path:
        """The file with the record of a variant's last trip."""
        return self._beside(_tripped(variant))

    def trip(self, variant: str = MAIN) -> Trip | None:
        """The record of a variant's last trip, of any version. OSError or RolloutError where it cannot be read."""
        return _read_trip(self.tripped(variant), variant)

    def trip_of(self, number: int, variant: str = MAIN) -> Trip | None:
        """The trip of a variant in a version by the history; None where it did not trip."""
        return _read_trip(self.history / f"{number:06}{_tripped(variant)}", variant)

    def trips_of(self, policy: Policy) -> list[Trip]:
        """The trips of all variants of a version, by the history."""
        found = (self.trip_of(policy.version, name) for name in policy.variants)
        return [trip for trip in found if trip is not None]

    def trip_in_force(self, number: int, variant: str = MAIN) -> Trip | None:
        """The trip of a variant that holds for a version in force: by the last record or, where somebody deleted it,
        by the history. OSError or RolloutError where either cannot be read."""
        trip = self.trip(variant)
        return trip if trip is not None and trip.version >= number else self.trip_of(number, variant)

    def trips_in_force(self, policy: Policy) -> dict[str, Trip]:
        """The trips that hold for a version, by variant. A record that cannot be read counts for every version."""
        found = {}
        for name in policy.variants:
            try:
                trip = self.trip_in_force(policy.version, name)
            except (OSError, RolloutError) as error:
                trip = Trip(DOUBT, str(error), now(), os.getpid(), variant=name)
            if trip is not None and trip.version >= policy.version:
                found[name] = trip
        return found

    # -- writing

    def write(
        self,
        make: Callable[[Policy | None], Policy],
        *,
        over: bool = False,
        dry_run: bool = False,
        anew: Collection[str] | None = None,
        probation: Trip | None = None,
    ) -> tuple[Policy | None, Policy]:
        """Writes a new version. ``make`` gets the version in the file (None: no file) and returns the wanted one with
        any number; the number is set here. Returns the old and the new version.

        Nothing is written where ``make`` returns the content of the file and no variant has tripped: both returned
        are the same.

        Args:
            over: where the file is gone or cannot be used, ``make`` gets the newest usable version of the history.
            dry_run: write nothing, only return both.
            anew: the variants whose trips end; None: all. The trips of others hold for the new version too.
            probation: a trip of the new version, of any number: its variant gets no request until it is proven.

        Raises what ``make`` raises, OSError, and RolloutError where the file (``over``: and every version) cannot be
        used.
        """
        with self.locked():
            try:
                old, lost = self.current(), False
            except RolloutError:
                if not over:
                    raise
                old, lost = None, True
            if old is None and over:
                old, lost = self._newest_usable(), True
            wanted = make(old)
            trips = {} if old is None else self.trips_in_force(old)
            if old is not None and wanted.content == old.content and not trips and not lost:
                return old, old
            new = dataclasses.replace(wanted, version=self._last(old, trips) + 1)
            held = [
                x
                for name, x in trips.items()
                if anew is not None and name not in anew and name in new.variants
            ]
            held += [] if probation is None else [probation]
            if not dry_run:
                self._publish(old, new, trips, [dataclasses.replace(x, version=new.version) for x in held])
            return old, new

    def _last(self, old: Policy | None, trips: dict[str, Trip]) -> int:
        """The highest number in any file."""
        numbers = [x.version for x in (old, *trips.values()) if x is not None and x.version < DOUBT]
        for path in self._tripped_files():  # of a version whose writer died before it was in force
            with contextlib.suppress(OSError, RolloutError):
                trip = _read_trip(path, MAIN)
                numbers += [trip.version] if trip is not None and trip.version < DOUBT else []
        for folder in (self.history, self.checks):
            names = [x.name for x in folder.iterdir()] if folder.is_dir() else []
            numbers += [int(found[1]) for name in names if (found := _NUMBERED.match(name))]
        return max(numbers, default=0)

    def _publish(self, old: Policy | None, new: Policy, trips: dict[str, Trip], held: list[Trip]) -> None:
        """In an order in which the death of this process at any point loses no version that was in force, leaves none
        in the history that never was, and lets no variant begin that is held."""
        self.history.mkdir(exist_ok=True)
        if old is not None:  # made by hand, or its writer died
            with contextlib.suppress(FileExistsError):
                place(self._kept(old.version), old.text, first=True)
            self._pending(old.version).unlink(missing_ok=True)
        for trip in trips.values():
            if trip.version < DOUBT:  # the server that tripped may not have had the right to
                self._keep_trip(trip)
        for trip in held:  # a record of a later version holds for the one in force too
            place(self.tripped(trip.variant), _text(trip))
        place(self._pending(new.version), new.text, first=True)
        try:
            place(self.path, new.text)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise OSError(
                errno.EBUSY,
                "cannot be replaced, since this file is mounted by itself: mount its folder instead",
                str(self.path),
            ) from error
        os.rename(self._pending(new.version), self._kept(new.version))
        for trip in held:
            self._keep_trip(trip)
        keep = {self.tripped(trip.variant) for trip in held}
        for path in self._tripped_files():  # of older versions, whose records are in the history
            if path not in keep:
                path.unlink(missing_ok=True)

    def _tripped_files(self) -> list[Path]:
        begin = self._beside(".tripped.").name
        names = os.listdir(self.path.parent) if self.path.parent.is_dir() else []
        return [self.path.with_name(x) for x in names if x.startswith(begin) and x.endswith(".json")]

    def _pending(self, number: int) -> Path:
        return self.history / f"{number:06}.pending"

    def _keep_trip(self, trip: Trip) -> None:
        with contextlib.suppress(FileExistsError):
            place(self.history / f"{trip.version:06}{_tripped(trip.variant)}", _text(trip), first=True)

    def _kept(self, number: int) -> Path:
        return self.history / f"{number:06}.json"

    def _newest_usable(self) -> Policy:
        for number in reversed(self.versions()):
            with contextlib.suppress(RolloutError):
                return self.version(number)
        raise RolloutError(
            f"there is no usable version of {self.path}, neither the file nor in {self.history}"
        )

    def record_trip(self, trip: Trip) -> Trip:
        """Tells all processes. Returns the record that stands: the first one of a version and variant."""
        with self.locked():
            with contextlib.suppress(RolloutError):  # a record that cannot be read is replaced by a good one
                standing = self.trip_in_force(trip.version, trip.variant)
                if standing is not None and standing.version >= trip.version:
                    trip = standing  # written again, where somebody deleted it
            place(self.tripped(trip.variant), _text(trip))
            with contextlib.suppress(OSError):  # else the next command does it
                self.history.mkdir(exist_ok=True)
                self._keep_trip(trip)
            return trip

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """While something is written. TimeoutError where another process does not finish."""
        lock = self._beside(".lock")
        fd = os.open(lock, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        end = time.monotonic() + self._patience_s
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= end:
                        raise TimeoutError(
                            f"{lock} is held by another process, for more than {self._patience_s:g} seconds"
                        ) from None
                    time.sleep(0.005)
            yield
        finally:
            os.close(fd)


def target_of(path: Path) -> Path:
    """The file that ``path`` leads to through symbolic links, whether it exists or not.

    Raises OSError: the links form a loop.
    """
    found = Path(os.path.realpath(path))
    if found.is_symlink():  # realpath gives up there
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return found


def mounted_by_itself(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Tells whether the file is a mount of its own, as containers mount single files. Replacing it outside changes
    nothing here. False where the system does not list its mounts."""
    try:
        lines = mounts.read_bytes().splitlines()
    except OSError:
        return False
    # Field 5 is the mount point, with blanks and backslashes as octal numbers.
    points = (line.split(b" ")[4] for line in lines if line.count(b" ") > 4)
    found = (re.sub(rb"\\([0-7]{3})", lambda x: bytes([int(x[1], 8)]), point) for point in points)
    return os.fsencode(path) in found


def place(path: Path, text: str, *, first: bool = False, mode: int = 0o666) -> None:
    """Write a file as a whole: whoever reads it sees all of ``text`` or what was there before, also after a crash.

    ``first``: only where there is none, FileExistsError otherwise, decided by the file system. ``mode``: of a file that
    replaces none; the process's mask applies.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(temporary, flags, mode), "w", encoding="utf-8") as file:
            file.write(text)
            if not first:
                _keep_rights(path, file.fileno())
            file.flush()
            os.fsync(file.fileno())
        if first:
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _keep_rights(path: Path, new: int) -> None:
    """Owner, group and mode of a file that is replaced, as far as this process may: an operator's command must not take
    the file away from the servers that read it."""
    try:
        old = path.stat()
    except FileNotFoundError:
        return
    for owner, group in ((old.st_uid, -1), (-1, old.st_gid)):
        with contextlib.suppress(PermissionError):
            os.fchown(new, owner, group)
    os.fchmod(new, stat.S_IMODE(old.st_mode))


def _tripped(variant: str) -> str:
    return ".tripped.json" if variant == MAIN else f".tripped.{variant}.json"


def _text(trip: Trip) -> str:
    return json.dumps(dataclasses.asdict(trip), indent=2) + "\n"


def _read_trip(path: Path, variant: str) -> Trip | None:
    source = f"the trip record {path}"
    try:
        text = text_of(path, source)
    except FileNotFoundError:
        return None
    data = read_object(text, source)
    try:
        trip = Trip(**data)
        integer("version", trip.version, 1)
        for name in ("reason", "time", "variant", "by"):
            if not isinstance(found := getattr(trip, name), str):
                raise RolloutError(f"{name} must be a string, got {found!r}")
    except (TypeError, RolloutError) as error:
        raise RolloutError(f"{source} is not usable: {error}") from error
    return dataclasses.replace(trip, variant=variant)
