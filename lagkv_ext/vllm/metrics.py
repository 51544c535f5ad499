"""Numbers of the plugin in vLLM's ``/metrics``.

vLLM's scheduler and workers are processes of their own, and its statistics have no room for a plugin's. So each of them
writes its totals to a small file in a folder that all share by an environment variable, and the process that serves
``/metrics`` adds the files up at every scrape. Nothing is written unless compression is on.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from lagkv_ext.vllm.plan import Plan

FOLDER_VARIABLE = "LAGKV_VLLM_METRICS_DIR"
WRITE_SECONDS = 0.5


class Totals:
    """The numbers of this process, written to its file soon after they change."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, Any] = {}
        self._timer: threading.Timer | None = None

    def add(self, name: str, amount: float) -> None:
        self.add_each({name: amount})

    def add_each(self, amounts: dict[str, float]) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._values[name] = self._values.get(name, 0) + amount
            if self._timer is None:
                self._write_soon()

    def set(self, name: str, value: float | str) -> None:
        with self._lock:
            self._values[name] = value
            if self._timer is None:
                self._write_soon()

    def get(self, name: str) -> float:
        with self._lock:
            return self._values.get(name, 0)

    def reset_after_fork(self) -> None:
        self.__init__()  # type: ignore[misc]

    def _write_soon(self) -> None:
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder:
            self._timer = threading.Timer(WRITE_SECONDS, self.write, [Path(folder)])
            self._timer.daemon = True
            self._timer.start()

    def write(self, folder: Path) -> None:
        """Replace the file. A folder that cannot be written costs the numbers, not the engine."""
        with self._lock:
            self._timer = None
            values = dict(self._values)
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            new = folder / f"{os.getpid()}.new"
            new.write_text(json.dumps(values), encoding="utf-8")
            new.replace(folder / f"{os.getpid()}.json")
        except OSError:
            return


totals = Totals()
os.register_at_fork(after_in_child=totals.reset_after_fork)


class RequestCounts:
    """Follows the requests of one scheduler: tokens seen, rows kept, partitions compressed."""

    _counted: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    @classmethod
    def of_pool(cls, pool: Any, plan: Plan) -> RequestCounts | None:
        """One for each block pool: where a model has several raw groups, they all see the same requests."""
        if pool in cls._counted:
            return None
        cls._counted.add(pool)
        return cls(plan)

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._tokens: dict[str, int] = {}
        self._requests: dict[str, Any] = {}

    def cached(self, request_id: str, tokens: int) -> None:
        """The first ``tokens`` tokens of a request were found in the prefix cache."""
        self._grow(request_id, self._tokens.get(request_id, 0), tokens)

    def scheduled(self, request_id: str, tokens: int) -> None:
        before, plan = self._tokens.get(request_id, 0), self.plan
        self._grow(request_id, before, tokens)
        if tokens // plan.boundary == before // plan.boundary:
            return  # as in nearly every step
        if partitions := plan.m(tokens // plan.boundary) - plan.m(before // plan.boundary):
            dropped = partitions * (plan.lag - plan.keep)
            totals.add_each({"partitions": partitions, "rows_dropped": dropped})

    def _grow(self, request_id: str, before: int, tokens: int) -> None:
        if tokens > before:
            self._tokens[request_id] = tokens
            same_state = before and (tokens - 1) // self.plan.boundary == (before - 1) // self.plan.boundary
            kept = tokens - before if same_state else self.plan.rows(tokens) - self.plan.rows(before)
            totals.add_each({"tokens_seen": tokens - before, "tokens_kept": kept})

    def seen(self, request: Any) -> bool:
        """Remembers the request; True the first time."""
        if request.request_id in self._requests:
            return False
        self._requests[request.request_id] = request
        return True

    def freed(self, request_id: str) -> None:
        """A request ended, or gave its blocks back to be computed again later."""
        tokens = self._tokens.pop(request_id, 0)
        request = self._requests.pop(request_id, None)
        totals.add_each({"tokens_seen": -tokens, "tokens_kept": -self.plan.rows(tokens)})
        if request is not None and request.is_finished():
            compressed = self.plan.m(tokens // self.plan.boundary) > 0
            totals.add("requests_compressed" if compressed else "requests_full", 1)


class CompressionTimer:
    """Adds the time inside its blocks to the totals: wall time on the CPU, time between events on CUDA."""

    def __init__(self) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        if device.type != "cuda":
            begin = time.perf_counter()
            yield
            totals.add("seconds", time.perf_counter() - begin)
            return
        if torch.cuda.is_current_stream_capturing():
            yield
            return
        self._collect()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._events.append((first, last))

    def _collect(self) -> None:
        while self._events and self._events[0][1].query():
            first, last = self._events.pop(0)
            totals.add("seconds", first.elapsed_time(last) / 1000)


class Collector:
    """Adds up the files in a folder for prometheus_client. No file, no metric."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        processes = read_totals(self._folder)
        if not processes:
            return
        model = next((str(values["model"]) for values in processes if "model" in values), "")

        def total(name: str) -> float:
            return sum(values.get(name, 0) for values in processes)

        def family(kind: Any, name: str, text: str, label: str, values: dict[str, float]) -> Any:
            made = kind(f"lagkv_vllm_{name}", text, labels=["model", *([label] if label else [])])
            for value_of_label, value in values.items():
                made.add_metric([model, *([value_of_label] if label else [])], value)
            return made

        seen, kept, row_bytes = total("tokens_seen"), total("tokens_kept"), total("row_bytes")
        yield family(
            GaugeMetricFamily,
            "tokens",
            "Tokens of running requests, and rows kept of them in a compressed layer",
            "state",
            {"seen": seen, "kept": kept},
        )
        yield family(
            GaugeMetricFamily,
            "cache_bytes",
            "The same in bytes, in the compressed layers of all ranks",
            "state",
            {"uncompressed": seen * row_bytes, "held": kept * row_bytes},
        )
        yield family(
            CounterMetricFamily,
            "requests",
            "Requests that ended, by whether rows were dropped",
            "cache",
            {kind: total(f"requests_{kind}") for kind in ("compressed", "full")},
        )
        yield family(
            CounterMetricFamily,
            "partitions_compressed",
            "Partitions compressed, each in all layers",
            "",
            {"": total("partitions")},
        )
        yield family(
            CounterMetricFamily,
            "rows_dropped",
            "Rows dropped, each in all layers",
            "",
            {"": total("rows_dropped")},
        )
        yield family(
            CounterMetricFamily,
            "compression_seconds",
            "Time spent compressing, by rank",
            "rank",
            {str(int(values["rank"])): values.get("seconds", 0) for values in processes if "rank" in values},
        )


def read_totals(folder: Path | None = None) -> list[dict[str, Any]]:
    """Reads what the processes of this engine last wrote."""
    if folder is None:
        named = os.environ.get(FOLDER_VARIABLE)
        if not named:
            return []
        folder = Path(named)
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue  # replaced or removed meanwhile
    return found


_collector: Collector | None = None
_owner: int | None = None  #: the process that named the folder


def share() -> None:
    """Name the folder for this process and its children, and serve what they write where prometheus_client is there."""
    global _collector, _owner
    # vLLM starts its processes by multiprocessing. A process that was started otherwise is another server, even if it
    # inherits the variable.
    if multiprocessing.parent_process() is None and _owner != os.getpid():
        _owner = os.getpid()
        folder = Path(tempfile.gettempdir()) / f"lagkv-vllm-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        os.environ[FOLDER_VARIABLE] = str(folder)
        atexit.register(_remove, folder, _owner)
    if _collector is None:
        try:
            from prometheus_client import REGISTRY
        except ImportError:
            return
        _collector = Collector()
        REGISTRY.register(_collector)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
