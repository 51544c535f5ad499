"""One structured log record for each request, through Python's ``logging``; as lines of JSON on request.

`CacheMonitor` emits it at INFO on the logger ``lagkv_ext.requests`` when a request ends. Where that logger is not
enabled for INFO, nothing is formatted. Lines of JSON::

    handler = logging.FileHandler("requests.jsonl")
    handler.setFormatter(JsonLines())
    logging.getLogger("lagkv_ext.requests").addHandler(handler)
    logging.getLogger("lagkv_ext.requests").setLevel(logging.INFO)

The fields are `RequestRecord`'s. They hold numbers, names and the request's id, nothing of what users wrote.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REQUESTS = logging.getLogger("lagkv_ext.requests")


@dataclass(frozen=True)
class RequestRecord:
    """Fields of one request's record; ``None`` where a value is not known."""

    request_id: str | None  #: of the rollout's decision
    outcome: str  #: "completed", "failed", "cancelled" or "abandoned"
    duration_s: float | None  #: wall time from `CacheMonitor.request` to its end; None where it was abandoned
    cache: str  #: "lagkv" for caches that LagKV compresses, "full" for all others
    variant: str  #: by the rollout; where there is none, as ``cache``
    reason: str | None  #: of the rollout's decision (`REASONS`)
    version: int | None  #: of the rollout file
    eligible: bool | None  #: whether the prompt is long enough for compression, whatever the variant
    settings: Mapping[str, Any] | None  #: of the compressed cache, by the rollout
    prompt_tokens: int | None  #: by the rollout
    tokens_seen: int | None  #: tokens that the request gave to the cache
    tokens_kept: float | None  #: rows that a full-attention layer held at the end, on average
    bytes_held: int | None  #: at the end
    bytes_saved: int | None  #: bytes of the keys and values of all tokens seen, minus ``bytes_held``
    compressions: int | None  #: each layer counted
    labels: Mapping[str, str] = field(default_factory=dict)  #: of the monitor


def log_request(record: RequestRecord) -> None:
    """Emit a record. Its dictionary is the attribute ``lagkv`` of the `logging.LogRecord`."""
    if REQUESTS.isEnabledFor(logging.INFO):
        duration = "unknown time" if record.duration_s is None else f"{record.duration_s:.3f} s"
        REQUESTS.info(
            "request %s %s in %s with the %s cache (variant %s), %s tokens, %s kept, %s bytes saved",
            record.request_id,
            record.outcome,
            duration,
            record.cache,
            record.variant,
            record.tokens_seen,
            record.tokens_kept,
            record.bytes_saved,
            extra={"lagkv": {"event": "request", **dataclasses.asdict(record)}},
        )


class JsonLines(logging.Formatter):
    """One JSON object a line: time (ISO 8601, UTC), level, logger, message, and the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        data: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "lagkv", {}),
        }
        if record.exc_info:
            data["exception"] = self.formatException(record.exc_info)
        return json.dumps(data, default=str)
