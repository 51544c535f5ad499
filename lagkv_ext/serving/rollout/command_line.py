"""Parts that all ``lagkv rollout`` commands share: the file, refusals, and reports of a change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from lagkv_ext.serving.rollout.policy import Policy
    from lagkv_ext.serving.rollout.store import Store

DEFAULT = Path("lagkv-rollout.json")

File = Annotated[
    Path, typer.Option("--file", "-f", help="The rollout file.", envvar="LAGKV_ROLLOUT", show_default=True)
]


class refusing:
    """Ends with exit status 2 and the reason where the operator can correct it."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, ValueError)):
            refuse(error)


def refuse(message: object) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def store_of(file: Path) -> Store:
    from lagkv_ext.serving.rollout.store import Store

    with refusing():
        return Store(file)


def there(policy: Policy | None, file: Path) -> Policy:
    """The policy itself. RolloutError where there is none."""
    from lagkv_ext.serving.rollout.policy import RolloutError

    if policy is None:
        raise RolloutError(f"there is no rollout file {file}; make one with lagkv rollout init {file}")
    return policy


def changes(old: Policy | None, new: Policy) -> list[str]:
    """One line for each value that differs, or for each value where there is no old version."""
    before, after = {} if old is None else _flat(old), _flat(new)
    if old is None:
        return [f"{name} {json.dumps(value)}" for name, value in after.items()]
    return [
        f"{name} {_shown(before, name)} -> {_shown(after, name)}"
        for name in dict.fromkeys([*after, *before])
        if before.get(name) != after.get(name) or (name in before) != (name in after)
    ]


def _shown(values: dict[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "unset"


def _flat(policy: Policy) -> dict[str, Any]:
    """Values by their path, as ``variants.eighth.settings.keep_ratio``; those of the only variant without its name."""
    found: dict[str, Any] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{path}.{name}" if path else name, inner)
        else:
            found[path] = value

    walk("", policy.content)
    return found
