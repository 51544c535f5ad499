"""The content of the rollout file: which requests are compressed, how, and what checks must show."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lagkv_ext.settings_file import checked_settings
from lagkv_ext.user_files import parse_object, read_text

FULL = "full"  #: the variant that nothing compresses
MAIN = "lagkv"  #: the variant of a file that names none
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}\Z")
_WHOLE = 2**64  # of `bucket`


class RolloutError(ValueError):
    """An error that the operator can correct: the message says what is wrong, what is expected, and what was found."""


@dataclass(frozen=True)
class Guard:
    """Bounds that quality checks must show (`Judge`)."""

    min_agreement: float = 0.97  #: mean share of answer tokens on which the full cache agrees, in (0, 1]
    max_kl: float = 0.1  #: mean KL(full || compressed), nats per token, over 0
    level: float = (
        0.01  #: probability that a version and variant that keeps to both bounds ever trips, in (0, 0.5]
    )
    recover: bool = False  #: whether a variant that tripped comes back by itself when checks show that it may
    window: int = 200  #: the most recent checks, of which means are shown; nothing is judged by it
    check_share: float = 0.01  #: of the compressed requests, in [0, 1]
    max_errors: int | None = (
        10  #: failures to make a cache, to generate or to check, in one process; None: no bound
    )


@dataclass(frozen=True)
class Variant:
    """One way to serve a share of the requests."""

    share: float  #: of all requests, in [0, 1]
    settings: Mapping[str, Any] = field(hash=False)  #: arguments of `LagKVCache`


@dataclass(frozen=True)
class LadderRules:
    """A ratio that adapts: the settings of one variant move along a ladder, one rung at a time."""

    rungs: tuple[Mapping[str, Any], ...] = field(
        hash=False
    )  #: settings, from the largest cache to the smallest
    variant: str = MAIN
    target_agreement: float = 0.98  #: smaller above it, larger below it; at least ``guard.min_agreement``
    level: float = 0.05  #: probability that a move is wrong, in (0, 0.5]
    smaller_per_day: int = 2  #: moves to a smaller cache in 24 hours, at least 1; larger ones are not limited
    hold_hours: float = 24.0  #: for how long a rung that failed is not tried again; doubles with each failure


@dataclass(frozen=True)
class Samples:
    """Answers that are stored for people to compare. They hold text of users."""

    share: float  #: of the compressed requests, in [0, 1]
    max: int = 100  #: samples in the folder, at least 1
    folder: str = "lagkv-samples"  #: beside the rollout file, or an absolute path


@dataclass(frozen=True)
class Written:
    """Who wrote a version, and why. No part of its content."""

    by: str  #: "operator", "ladder" or "guard"
    time: str  #: ISO 8601, UTC
    why: str
    evidence: Mapping[str, Any] | None = field(
        default=None, hash=False
    )  #: numbers of the checks that led to it


@dataclass(frozen=True)
class Policy:
    """One version of the rollout file."""

    version: int
    enabled: bool
    variants: Mapping[str, Variant] = field(
        hash=False
    )  #: by name, in the order of the file; the rest is `FULL`
    min_prompt_tokens: int = 0  #: shorter prompts get the full cache
    guard: Guard = Guard()
    ladder: LadderRules | None = None
    samples: Samples | None = None
    written: Written | None = None

    @property
    def share(self) -> float:
        """Share of all requests that any variant compresses."""
        return math.fsum(x.share for x in self.variants.values())

    @property
    def content(self) -> dict[str, Any]:
        """Everything but the version and who wrote it, as in the file."""
        data: dict[str, Any] = {"enabled": self.enabled}
        if list(self.variants) == [MAIN]:
            data |= {"share": self.variants[MAIN].share}
        else:
            rest = {FULL: {"share": max(round(1 - self.share, 12), 0.0)}}
            data |= {
                "variants": {**rest, **{name: dataclasses.asdict(x) for name, x in self.variants.items()}}
            }
        data |= {"min_prompt_tokens": self.min_prompt_tokens}
        if list(self.variants) == [MAIN]:
            data |= {"settings": dict(self.variants[MAIN].settings)}
        data |= {"guard": dataclasses.asdict(self.guard)}
        for name in ("ladder", "samples"):
            if (part := getattr(self, name)) is not None:
                data[name] = dataclasses.asdict(part)
        return json.loads(json.dumps(data))

    @property
    def text(self) -> str:
        """The text that `parse` reads back as an equal policy."""
        written = {} if self.written is None else {"written": dataclasses.asdict(self.written)}
        return json.dumps({"version": self.version, **self.content, **written}, indent=2) + "\n"

    def changed(self, name: str, **changes: Any) -> Policy:
        """With other fields of one `Variant`."""
        variant = dataclasses.replace(self.variants[name], **changes)
        return dataclasses.replace(self, variants={**self.variants, name: variant})

    def variant_of(self, request_id: str) -> str:
        """The variant of a request: a name of `variants`, or `FULL`. The same id gets the same one for good.

        Ids lie evenly on a line. The first variant takes its share from the left end, the second from the right
        end, the third joins the first, the fourth the second, and so on; `FULL` has the middle. So a larger share
        of the first or the second variant only adds ids to it, taken from the middle.
        """
        point = bucket(request_id)
        left, right = 0.0, 0.0
        for i, (name, variant) in enumerate(self.variants.items()):
            if i % 2 == 0:
                left += variant.share
                if point < left * _WHOLE:
                    return name
            else:
                right += variant.share
                if _WHOLE - 1 - point < right * _WHOLE:
                    return name
        return FULL

    def checks(self, request_id: str) -> bool:
        """Tells whether a compressed request is within ``guard.check_share``; independent of its variant."""
        return bucket(request_id, "check") < self.guard.check_share * _WHOLE

    def is_sampled(self, request_id: str) -> bool:
        """Tells whether a compressed request is within ``samples.share``; independent of its variant and of checks."""
        return self.samples is not None and bucket(request_id, "sample") < self.samples.share * _WHOLE


def bucket(request_id: str, purpose: str = "share") -> int:
    """A number below ``2 ** 64`` that depends on the id alone: the same in every process, on every machine, for good.

    64 bits of BLAKE2b, so uniform for any ids that differ. Multiplying a share by ``2 ** 64`` does not round.
    """
    digest = hashlib.blake2b(
        request_id.encode("utf-8", "surrogatepass"), digest_size=8, person=f"lagkv {purpose}".encode()
    )
    return int.from_bytes(digest.digest(), "big")


def parse(text: str, source: str, config: Any = None) -> Policy:
    """The policy in ``text``; ``source`` names its origin in messages.

    With ``config``, a model's, the settings are tried by making a `LagKVCache`, unless the policy is not enabled and
    makes none. Without it their names are checked here, and their values by `check_values`.

    Raises RolloutError: anything is wrong.
    """
    data = read_object(text, source)
    try:
        policy = checked(_policy(data, source))
    except RolloutError as error:
        message = str(error)
        raise RolloutError(message if message.startswith(source) else f"{source}: {message}") from None
    if config is not None and policy.enabled:  # no settings may keep a server from obeying "off"
        from lagkv_ext import LagKVCache

        for name, variant in policy.variants.items():
            try:
                LagKVCache(config, **variant.settings)
            except Exception as error:  # whatever it is, these settings make no cache
                raise RolloutError(f"{source}: {_settings_of(policy, name)}: {error}") from error
    return policy


def _policy(data: dict[str, Any], source: str) -> Policy:
    names = [*(x.name for x in dataclasses.fields(Policy)), "share", "settings"]
    several = "variants" in data
    _names(source, data, names, required=("version", "enabled", *(() if several else ("share", "settings"))))
    if several and (twice := [name for name in ("share", "settings") if name in data]):
        raise RolloutError(
            f"{source} must have 'variants' or 'share' and 'settings', got {twice[0]!r} beside 'variants'"
        )
    if several:
        variants = _variants(data.pop("variants"), source)
    else:
        settings = _settings(data.pop("settings"), f"{source}: settings")
        variants = {MAIN: Variant(data.pop("share"), settings)}
    guard = _fields(Guard, data.pop("guard", {}), f"{source}: guard", obsolete=("min_checks",))
    ladder = data.pop("ladder", None)
    if ladder is not None:
        ladder = _ladder(ladder, f"{source}: ladder")
    parts = {
        name: _fields(kind, data.pop(name), f"{source}: {name}")
        for name, kind in (("samples", Samples), ("written", Written))
        if data.get(name) is not None
    }
    return Policy(**{**data, "variants": variants, "guard": guard, "ladder": ladder, **parts})


def _variants(data: Any, source: str) -> dict[str, Variant]:
    if not isinstance(data, dict):
        raise RolloutError(f"{source}: variants must be an object, got {data!r}")
    found, full = {}, None
    for name, variant in data.items():
        where = f"{source}: variants.{name}"
        if name == FULL:
            full = _fields(_Full, variant, where).share
            continue
        made = _fields(Variant, variant, where)
        found[name] = dataclasses.replace(made, settings=_settings(made.settings, f"{where}.settings"))
    if full is not None:
        number("variants.full.share", full, 0, 1)
        for name, variant in found.items():
            number(f"variants.{name}.share", variant.share, 0, 1)
        if not math.isclose(total := math.fsum([full, *(x.share for x in found.values())]), 1, abs_tol=1e-9):
            raise RolloutError(
                f"{source}: shares of variants with {FULL!r} must add up to 1, got {total:.12g}"
            )
    return found


@dataclass(frozen=True)
class _Full:
    share: float


def _ladder(data: Any, source: str) -> LadderRules:
    made = _fields(LadderRules, data, source)
    if not isinstance(made.rungs, list) or not made.rungs:
        raise RolloutError(
            f"{source}: rungs must be a list of at least one object of settings, got {made.rungs!r}"
        )
    rungs = tuple(_settings(x, f"{source}: rung {i}") for i, x in enumerate(made.rungs))
    check_rungs(rungs, source)
    return dataclasses.replace(made, rungs=rungs)


def check_rungs(settings: Any, source: str) -> None:
    """RolloutError where settings of two rungs are equal, or no cache takes them."""
    for i, one in enumerate(settings):
        check_values(one, f"{source}: rung {i}")
        for j, other in enumerate(settings[:i]):
            if dict(one) == dict(other):
                raise RolloutError(f"{source}: rungs {j} and {i} have the same settings")


def _settings(data: Any, source: str) -> dict[str, Any]:
    try:
        return checked_settings(data, source)
    except ValueError as error:
        raise RolloutError(str(error)) from None


def _settings_of(policy: Policy, name: str) -> str:
    return "settings" if list(policy.variants) == [MAIN] else f"variants.{name}.settings"


def _fields(kind: Any, data: Any, source: str, obsolete: tuple[str, ...] = ()) -> Any:
    """A dataclass from an object with its fields. Names that are obsolete are read over."""
    if not isinstance(data, dict):
        raise RolloutError(f"{source} must be an object, got {data!r}")
    data = {name: value for name, value in data.items() if name not in obsolete}
    known = dataclasses.fields(kind)
    required = [x.name for x in known if x.default is dataclasses.MISSING]
    _names(source, data, [x.name for x in known], required)
    return kind(**data)


def read(path: Path, config: Any = None) -> Policy:
    """As `parse`. Raises FileNotFoundError, other OSError, and RolloutError."""
    source = f"the rollout file {path}"
    return parse(text_of(path, source), source, config)


def check_values(settings: Mapping[str, Any], source: str) -> None:
    """RolloutError for values that no model's `LagKVCache` takes, as far as that is known without its config."""
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


def _names(source: str, data: dict[str, Any], known: Sequence[str], required: Sequence[str] = ()) -> None:
    if unknown := [name for name in data if name not in known]:
        raise RolloutError(f"{source} has the unknown name {unknown[0]!r}; known: {', '.join(known)}")
    if missing := [name for name in required if name not in data]:
        raise RolloutError(f"{source} must have {missing[0]!r}; required: {', '.join(required)}")


def checked(policy: Policy) -> Policy:
    """``policy`` itself. RolloutError where one of its values is wrong; settings are not tried."""
    integer("version", policy.version, 1)
    flag("enabled", policy.enabled)
    integer("min_prompt_tokens", policy.min_prompt_tokens, 0)
    _check_variants(policy)
    _check_guard(policy.guard)
    if policy.ladder is not None:
        _check_ladder(policy, policy.ladder)
    if (samples := policy.samples) is not None:
        number("samples.share", samples.share, 0, 1)
        integer("samples.max", samples.max, 1)
        if not isinstance(samples.folder, str) or not samples.folder:
            raise RolloutError(f"samples.folder must be a path, got {samples.folder!r}")
    if (written := policy.written) is not None:
        for name in ("by", "time", "why"):
            if not isinstance(found := getattr(written, name), str):
                raise RolloutError(f"written.{name} must be a string, got {found!r}")
        if written.evidence is not None and not isinstance(written.evidence, Mapping):
            raise RolloutError(f"written.evidence must be an object or null, got {written.evidence!r}")
    return policy


def _check_variants(policy: Policy) -> None:
    if not policy.variants:
        raise RolloutError("variants must have at least one besides 'full'")
    single = list(policy.variants) == [MAIN]
    for name, variant in policy.variants.items():
        if not _NAME.match(name) or name == FULL:
            raise RolloutError(
                f"the name of a variant must have 1 to 32 of a to z, 0 to 9, '_', '.', '-', and not be {FULL!r}, got "
                f"{name!r}"
            )
        number("share" if single else f"variants.{name}.share", variant.share, 0, 1)
    if policy.share > 1 + 1e-9:
        raise RolloutError(f"shares of variants must add up to at most 1, got {policy.share:.12g}")


def _check_guard(guard: Guard) -> None:
    number("guard.min_agreement", guard.min_agreement, 0, 1, above=True)
    number("guard.max_kl", guard.max_kl, 0, math.inf, above=True)
    number("guard.level", guard.level, 0, 0.5, above=True)
    flag("guard.recover", guard.recover)
    integer("guard.window", guard.window, 1)
    number("guard.check_share", guard.check_share, 0, 1)
    if guard.max_errors is not None:
        integer("guard.max_errors", guard.max_errors, 1)


def _check_ladder(policy: Policy, ladder: LadderRules) -> None:
    number("ladder.target_agreement", ladder.target_agreement, 0, 1, above=True)
    number("ladder.level", ladder.level, 0, 0.5, above=True)
    integer("ladder.smaller_per_day", ladder.smaller_per_day, 1)
    number("ladder.hold_hours", ladder.hold_hours, 0, math.inf)
    if ladder.target_agreement < policy.guard.min_agreement:
        raise RolloutError(
            f"ladder.target_agreement must be at least guard.min_agreement ({policy.guard.min_agreement:g}), got "
            f"{ladder.target_agreement:g}"
        )
    if not isinstance(ladder.variant, str) or ladder.variant not in policy.variants:
        raise RolloutError(
            f"ladder.variant must be one of {', '.join(policy.variants)}, got {ladder.variant!r}"
        )
    if rung_of(policy) is None:
        raise RolloutError(
            f"the settings of the variant {ladder.variant!r} must be a rung of the ladder, got "
            f"{dict(policy.variants[ladder.variant].settings)!r}"
        )


def rung_of(policy: Policy) -> int | None:
    """The index of the rung that the ladder's variant stands on. None: no ladder, or settings that are no rung."""
    if policy.ladder is None:
        return None
    settings = dict(policy.variants[policy.ladder.variant].settings)
    return next((i for i, rung in enumerate(policy.ladder.rungs) if dict(rung) == settings), None)


def flag(name: str, value: Any) -> None:
    """RolloutError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise RolloutError(f"{name} must be true or false, got {value!r}")


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
