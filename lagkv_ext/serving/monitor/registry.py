"""Metrics on a registry: one family a name, shared by all that report on the registry, told apart by their labels."""

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
#: Labels that metrics have by themselves.
RESERVED = ("cache", "le", "outcome", "reason", "state")


class Families:
    """The metrics of one kind on one registry. Subclasses make the ones that are counted in ``__init__`` and yield the
    ones that are read at scrape time, if any, from `families`."""

    title: str  #: what reports, in messages

    def __init__(self, label_names: tuple[str, ...]):
        self.label_names = label_names
        self.members: dict[tuple[str, ...], Any] = {}  #: None until `admit`

    def counted(self) -> list[MetricWrapperBase]:
        return [x for x in vars(self).values() if isinstance(x, MetricWrapperBase)]

    def families(self, members: list[tuple[tuple[str, ...], Any]]) -> Iterator[Metric]:
        """With the samples of these members. Must not raise: one error would cost the registry its whole scrape."""
        yield from ()

    # -- what a registry calls

    def describe(self) -> list[Metric]:
        return list(self.families([]))

    def collect(self) -> Iterator[Metric]:
        yield from self.families([(values, x) for values, x in list(self.members.items()) if x is not None])

    def admit(self, values: tuple[str, ...], member: Any) -> None:
        """From now on scrapes read ``member``, which has `join`ed."""
        self.members[values] = member

    def leave(self, values: tuple[str, ...], member: Any) -> None:
        """Scrapes read it no more, and its labels are free. What was counted under them stays, and is counted on."""
        with _lock:
            if self.members.get(values) is member:
                del self.members[values]


F = TypeVar("F", bound=Families)
_lock = threading.Lock()
_registered: weakref.WeakKeyDictionary[CollectorRegistry, dict[type, Families]] = weakref.WeakKeyDictionary()


def join(kind: type[F], registry: Any, labels: Any) -> tuple[F, tuple[str, ...]]:
    """The metrics of this kind on ``registry``, and the values of ``labels``, which are the caller's from now on.

    Raises:
        TypeError: no registry, labels that are no strings.
        ValueError: label names that cannot be; other label names than those of the first on this registry; the same
            values again; metrics of these names that somebody else made.
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
        if found is None:
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
    """The metric under these label values; the metric itself where it has no labels."""
    return metric.labels(*values) if values else metric


def _register(families: Families, registry: CollectorRegistry) -> None:
    done: list[Any] = []
    try:
        for collector in (families, *families.counted()):  # first what counts its own readings
            registry.register(collector)
            done.append(collector)
    except ValueError as error:
        for collector in done:
            registry.unregister(collector)
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
