"""Reuses one metric family per name on a registry; monitors differ by their labels."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import CollectorRegistry

__all__ = ["REGISTRY", "RESERVED", "Families", "child", "join"]

_LABEL = re.compile(r"[a-zA-Z][a-zA-Z0-9_]*\Z")
#: Labels that the metrics have already.
RESERVED = ("cache", "le", "outcome", "reason", "state", "variant", "verdict")


class Families:
    """All metrics of one kind on one registry, as one collector: a registry has all of them or none.

    Subclasses create the counted metrics in ``__init__`` (``registry=None``) and yield those read at scrape time, if
    any, from `families`.
    """

    title: str  #: the class that reports, for messages

    def __init__(self, label_names: tuple[str, ...]):
        self.label_names = label_names
        self.members: dict[tuple[str, ...], Any] = {}  #: by label values; None until `admit`
        self._probe: int | None = None  # the thread that asks whether a registry has this collector
        self._found = False

    def counted(self) -> list[MetricWrapperBase]:
        """The metrics that are counted as events happen."""
        return [x for x in vars(self).values() if isinstance(x, MetricWrapperBase)]

    def families(self, members: list[tuple[tuple[str, ...], Any]]) -> Iterator[Metric]:
        """The metrics read at scrape time, with the samples of these members. Must not raise: an error would cost the
        registry its whole scrape."""
        yield from ()

    def is_registered(self, registry: CollectorRegistry) -> bool:
        """Tells whether ``registry`` exports this collector now.

        A registry can only be asked for names, which another collector may have taken since, so `collect` notes that it
        was called. It reads nothing for this.
        """
        name = self.describe()[0].name
        self._found, self._probe = False, threading.get_ident()
        try:
            for _ in registry.restricted_registry([name]).collect():
                pass
        finally:
            self._probe = None
        return self._found

    # -- called by a registry

    def describe(self) -> list[Metric]:
        counted = (family for metric in self.counted() for family in metric.describe())
        return [*counted, *self.families([])]

    def collect(self) -> Iterator[Metric]:
        if self._probe == threading.get_ident():
            self._found = True
            return
        # First the families that are read now: some counters count these readings.
        yield from self.families([(values, x) for values, x in list(self.members.items()) if x is not None])
        for metric in self.counted():
            yield from metric.collect()

    def admit(self, values: tuple[str, ...], member: Any) -> None:
        """From now on scrapes read ``member``, which has `join`ed."""
        self.members[values] = member

    def leave(self, values: tuple[str, ...], member: Any) -> None:
        """Scrapes no longer read it, and its labels are free. Its counters remain, and the next member under these
        labels continues them."""
        with _lock:
            if self.members.get(values) is member:
                del self.members[values]


F = TypeVar("F", bound=Families)
_lock = threading.Lock()
_registered: weakref.WeakKeyDictionary[CollectorRegistry, dict[type, Families]] = weakref.WeakKeyDictionary()


def join(kind: type[F], registry: Any, labels: Any) -> tuple[F, tuple[str, ...]]:
    """The metrics of this kind on ``registry``, and the values of ``labels``, reserved for the caller.

    The collector of earlier calls is shared as long as the registry exports it. Where somebody unregistered it, the
    registry counts as new and gets another one; members of the old one are no longer exported.

    Raises:
        TypeError: ``registry`` is no registry; labels are no strings.
        ValueError: invalid label names; other label names than those of the first on this registry; values that are in
            use; another collector has metrics of these names.
    """
    if not isinstance(registry, CollectorRegistry):
        raise TypeError(
            f"registry must be a prometheus_client.CollectorRegistry, got {type(registry).__name__}"
        )
    labels = _checked(labels)
    names, values = tuple(labels), tuple(labels.values())
    with _lock:
        kinds = _registered.setdefault(registry, {})
        found = kinds.get(kind)
        if found is None or not found.is_registered(registry):
            found = kind(names)
            _register(found, registry)
            kinds[kind] = found
        if found.label_names != names:
            raise ValueError(
                f"labels must be {_text(found.label_names)}, as for the first {kind.title} on this registry, got "
                f"{_text(names)}"
            )
        if values in found.members:
            raise ValueError(
                f"registry already has a {kind.title} with labels {labels}: use that one, give this one other values, "
                "or a registry of its own"
            )
        found.members[values] = None
        assert isinstance(found, kind)
        return found, values


def child(metric: Any, *values: str) -> Any:
    """The metric with these label values; the metric itself where it has no labels."""
    return metric.labels(*values) if values else metric


def _register(families: Families, registry: CollectorRegistry) -> None:
    try:
        registry.register(families)
    except ValueError as error:
        raise ValueError(
            f"registry must not have metrics named as those of a {families.title}, got one that has: {error}"
        ) from error


def _checked(labels: Any) -> dict[str, str]:
    if labels is None:
        return {}
    if not isinstance(labels, Mapping):
        raise TypeError(f"labels must be a mapping of names to strings, got {type(labels).__name__}")
    for name, value in labels.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"labels must map strings to strings, got {name!r}: {value!r}")
        if not _LABEL.match(name):
            raise ValueError(
                f"labels must have names of letters, digits and underscores that begin with a letter, got {name!r}"
            )
        if name in RESERVED:
            raise ValueError(
                f"labels must not be named {', '.join(RESERVED)}, which metrics have themselves, got {name!r}"
            )
    return dict(sorted(labels.items()))


def _text(names: tuple[str, ...]) -> str:
    return f"{{{', '.join(names)}}}" if names else "none"
