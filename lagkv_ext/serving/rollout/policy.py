"""The rollout file's content: which requests are compressed, how, and what must hold; checked wholly when read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lagkv_ext.settings_file import checked_settings
from lagkv_ext.user_files import parse_object, read_text


class RolloutError(ValueError):
    """Something the operator can mend: the message says what was wrong, what was expected, and what came."""


@dataclass(frozen=True)
class Guard:
    """What quality checks must show (`Breaker`)."""

    min_agreement: float = (
        0.97  #: mean share of answer tokens that the full cache would have said too, in (0, 1]
    )
    max_kl: float = 0.1  #: mean KL(full || compressed), nats per token, over 0
    min_checks: int = 20  #: checks before a mean is judged, at least 1
    window: int = 200  #: the most recent checks that the means are of, at least ``min_checks``
    check_share: float = 0.01  #: of the compressed requests, in [0, 1]
    max_errors: int | None = 10  #: failures to make a cache or to check, in one process; None: no bound


@dataclass(frozen=True)
class Policy:
    """One version of the rollout file."""

    version: int
    enabled: bool
    share: float  #: of all requests, in [0, 1]
    settings: Mapping[str, Any] = field(hash=False)  #: arguments of `LagKVCache`
    min_prompt_tokens: int = 0  #: shorter prompts get the full cache
    guard: Guard = Guard()

    @property
    def content(self) -> dict[str, Any]:
        """Everything but the version, as in the file."""
        data = dataclasses.asdict(self)
        del data["version"]
        return json.loads(json.dumps(data))

    @property
    def text(self) -> str:
        """What `parse` reads back as an equal policy."""
        order = ("version", "enabled", "share", "min_prompt_tokens", "settings", "guard")
        data = {"version": self.version, **self.content}
        return json.dumps({name: data[name] for name in order}, indent=2) + "\n"

    def selects(self, request_id: str) -> bool:
        """Whether a request is within ``share``. A request keeps its side for good, and a larger share only adds."""
        return bucket(request_id) < self.share * 2**64

    def checks(self, request_id: str) -> bool:
        """Whether a compressed request is within ``guard.check_share``; independent of `selects`."""
        return bucket(request_id, "check") < self.guard.check_share * 2**64


def bucket(request_id: str, purpose: str = "share") -> int:
    """A number below ``2 ** 64`` that depends on the id alone: the same in every process, on every machine, for good.

    64 bits of BLAKE2b, so uniform for any ids that differ. Multiplying a share by ``2 ** 64`` does not round.
    """
    digest = hashlib.blake2b(
        request_id.encode("utf-8", "surrogatepass"), digest_size=8, person=f"lagkv {purpose}".encode()
    )
    return int.from_bytes(digest.digest(), "big")


def parse(text: str, source: str, config: Any = None) -> Policy:
    """The policy in ``text``; ``source`` says in messages where that was read.

    With ``config``, a model's, the settings are tried by making a `LagKVCache`, unless the policy is not enabled and
    makes none. Without it their names are checked here and their values by `check_values`.

    Raises RolloutError: whatever is wrong.
    """
    data = read_object(text, source)
    _names(source, data, Policy, required=("version", "enabled", "share", "settings"))
    guard = data.get("guard", {})
    if not isinstance(guard, dict):
        raise RolloutError(f"{source}: guard must be an object, got {guard!r}")
    _names(f"{source}: guard", guard, Guard)
    try:
        data["settings"] = checked_settings(data["settings"], f"{source}: settings")
        policy = Policy(**{**data, "guard": Guard(**guard)})
        checked(policy)
    except RolloutError as error:
        raise RolloutError(f"{source}: {error}") from None
    except ValueError as error:
        raise RolloutError(str(error)) from None
    if config is not None and policy.enabled:  # nothing about settings must keep a server from obeying "off"
        from lagkv_ext import LagKVCache

        try:
            LagKVCache(config, **policy.settings)
        except Exception as error:  # whatever it is, these settings make no cache
            raise RolloutError(f"{source}: settings: {error}") from error
    return policy


def read(path: Path, config: Any = None) -> Policy:
    """As `parse`. Raises FileNotFoundError, other OSError, and RolloutError."""
    source = f"the rollout file {path}"
    return parse(text_of(path, source), source, config)


def check_values(settings: Mapping[str, Any], source: str) -> None:
    """RolloutError for values that no model's `LagKVCache` takes, as far as that can be told without its config."""
    from lagkv_ext.cache.settings import keep_count, layer_settings

    given = {
        "lag_size": 128,
        "sink_size": 16,
        "keep_ratio": None,
        "keep": None,
        "value_weight": 1.0,
        "score": "std",
    }
    others = ("layer_keep_ratio", "skip_layers", "offloading", "offload_only_non_sliding")
    try:
        base = layer_settings(**{**given, **{k: v for k, v in settings.items() if k not in others}})
        for layer, ratio in (settings.get("layer_keep_ratio") or {}).items():
            keep_count(f"layer_keep_ratio[{layer}]", ratio, base.lag_size)
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise RolloutError(f"{source}: settings: {error}") from error


def read_object(text: str, source: str) -> dict[str, Any]:
    """`parse_object` with RolloutError."""
    try:
        return parse_object(text, source)
    except ValueError as error:
        raise RolloutError(str(error)) from error


def text_of(path: Path, source: str) -> str:
    """`read_text` with RolloutError where the file is not UTF-8. OSError where it cannot be read."""
    try:
        return read_text(path, source)
    except ValueError as error:
        raise RolloutError(str(error)) from error


def _names(source: str, data: dict[str, Any], kind: Any, required: tuple[str, ...] = ()) -> None:
    known = [x.name for x in dataclasses.fields(kind)]
    if unknown := [name for name in data if name not in known]:
        raise RolloutError(f"{source} has the unknown name {unknown[0]!r}; known: {', '.join(known)}")
    if missing := [name for name in required if name not in data]:
        raise RolloutError(f"{source} must say {missing[0]!r}; required are {', '.join(required)}")


def checked(policy: Policy) -> Policy:
    """``policy`` itself. RolloutError where a value of it, the settings aside, is wrong."""
    guard = policy.guard
    integer("version", policy.version, 1)
    if not isinstance(policy.enabled, bool):
        raise RolloutError(f"enabled must be true or false, got {policy.enabled!r}")
    number("share", policy.share, 0, 1)
    integer("min_prompt_tokens", policy.min_prompt_tokens, 0)
    number("guard.min_agreement", guard.min_agreement, 0, 1, above=True)
    number("guard.max_kl", guard.max_kl, 0, math.inf, above=True)
    integer("guard.min_checks", guard.min_checks, 1)
    integer("guard.window", guard.window, 1)
    if guard.window < guard.min_checks:
        raise RolloutError(
            f"guard.window must be at least guard.min_checks ({guard.min_checks}), got {guard.window}"
        )
    number("guard.check_share", guard.check_share, 0, 1)
    if guard.max_errors is not None:
        integer("guard.max_errors", guard.max_errors, 1)
    return policy


def integer(name: str, value: Any, least: int) -> None:
    """RolloutError unless ``value`` is an int (no bool) of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RolloutError(f"{name} must be an integer of at least {least}, got {value!r}")


def number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    """RolloutError unless ``value`` is a finite number (no bool) in ``[low, high]``, or over ``low``."""
    # No math.isfinite, which cannot take every int.
    good = not isinstance(value, bool) and isinstance(value, (int, float)) and -math.inf < value < math.inf
    if not good or not low <= value <= high or (above and value == low):
        bounds = f"{'over' if above else 'from'} {low}" + (f" to {high}" if math.isfinite(high) else "")
        raise RolloutError(f"{name} must be a number {bounds}, got {value!r}")
