"""The commands ``lagkv rollout ...``: each writes one version, and says what it changed from which version to which."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from lagkv_ext.serving.rollout.policy import Policy
    from lagkv_ext.serving.rollout.store import Store, Trip

DEFAULT = Path("lagkv-rollout.json")

app = typer.Typer(
    help="Compress a share of a server's requests: grow it, switch it off, go back, without a restart.",
    no_args_is_help=True,
)

File = Annotated[
    Path, typer.Option("--file", "-f", help="The rollout file.", envvar="LAGKV_ROLLOUT", show_default=True)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would change, write nothing.")]
Share = Annotated[float | None, typer.Option(help="Of all requests, from 0 to 1.")]
Prompt = Annotated[int | None, typer.Option(help="Prompts shorter than this get the full cache.")]
Agreement = Annotated[float | None, typer.Option(help="Guard: mean agreement of checks, over 0 to 1.")]
Kl = Annotated[float | None, typer.Option(help="Guard: mean KL of checks, nats per token.")]
Checks = Annotated[int | None, typer.Option(help="Guard: checks before a mean is judged.")]
Window = Annotated[int | None, typer.Option(help="Guard: most recent checks that means are of.")]
CheckShare = Annotated[float | None, typer.Option(help="Guard: share of the compressed requests checked.")]
Errors = Annotated[int | None, typer.Option(help="Guard: failures in one process; 0 for no bound.")]
Model = Annotated[
    Path | None, typer.Option(help="A model's folder: try the settings with its config.json too.")
]


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="The rollout file to make.")] = DEFAULT,
    settings: Annotated[Path, typer.Option(help="A lagkv.json.")] = Path("lagkv.json"),
    share: Annotated[float, typer.Option(help="Of all requests, from 0 to 1.")] = 0.01,
    min_prompt_tokens: Annotated[int, typer.Option(help="Shorter prompts get the full cache.")] = 0,
    min_agreement: Agreement = None,
    max_kl: Kl = None,
    min_checks: Checks = None,
    window: Window = None,
    check_share: CheckShare = None,
    max_errors: Errors = None,
    model: Model = None,
    dry_run: DryRun = False,
) -> None:
    """Make a rollout file from the settings that `lagkv evaluate` found."""
    from lagkv_ext.serving.rollout.policy import Guard, Policy, RolloutError

    guard = _guard(Guard(), min_agreement, max_kl, min_checks, window, check_share, max_errors)

    def make(old: Policy | None) -> Policy:
        if old is not None:
            raise RolloutError(
                f"{file} is there already, version {old.version}: change it with lagkv rollout set"
            )
        return Policy(1, True, share, _settings(settings, model), min_prompt_tokens, guard)

    _write(file, make, dry_run)


@app.command("set")
def set_(
    file: File = DEFAULT,
    share: Share = None,
    min_prompt_tokens: Prompt = None,
    settings: Annotated[Path | None, typer.Option(help="A lagkv.json in place of the settings.")] = None,
    min_agreement: Agreement = None,
    max_kl: Kl = None,
    min_checks: Checks = None,
    window: Window = None,
    check_share: CheckShare = None,
    max_errors: Errors = None,
    model: Model = None,
    dry_run: DryRun = False,
) -> None:
    """Change the share, or anything else, in a new version. What tripped begins anew."""
    guard = (min_agreement, max_kl, min_checks, window, check_share, max_errors)
    if all(x is None for x in (share, min_prompt_tokens, settings, *guard)):
        _refuse(
            "say what to set: --share, --min-prompt-tokens, --settings or an option of the guard (--help)"
        )

    def make(old: Policy | None) -> Policy:
        old = _there(old, file)
        given = {
            "share": share,
            "min_prompt_tokens": min_prompt_tokens,
            "settings": None if settings is None else _settings(settings, model),
            "guard": _guard(old.guard, *guard),
        }
        return dataclasses.replace(old, **{k: v for k, v in given.items() if v is not None})

    _write(file, make, dry_run)


@app.command()
def off(file: File = DEFAULT, dry_run: DryRun = False) -> None:
    """Every request gets the full cache. Works also where the file is damaged or gone, from its history."""
    _write(file, lambda old: dataclasses.replace(_there(old, file), enabled=False), dry_run, over=True)


@app.command()
def on(file: File = DEFAULT, dry_run: DryRun = False) -> None:
    """Compress again after off, with the share and settings of before. What tripped begins anew."""
    _write(file, lambda old: dataclasses.replace(_there(old, file), enabled=True), dry_run)


@app.command()
def back(
    version: Annotated[
        int | None, typer.Argument(help="By default the last one before that differs and did not trip.")
    ] = None,
    file: File = DEFAULT,
    even_if_tripped: Annotated[
        bool, typer.Option("--even-if-tripped", help="Also to a version that tripped.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """A new version with the content of an older one."""
    store = _store(file)

    def make(old: Policy | None) -> Policy:
        from lagkv_ext.serving.rollout.policy import RolloutError

        old = _there(old, file)
        found = _before(store, old) if version is None else store.version(version)
        if (trip := store.trip_of(found.version)) is not None and not even_if_tripped:
            raise RolloutError(
                f"version {found.version} tripped: {trip.reason}; --even-if-tripped takes it anyway"
            )
        typer.echo(f"content of version {found.version}")
        return found

    _write(file, make, dry_run, over=True)


@app.command()
def show(
    file: File = DEFAULT, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False
) -> None:
    """The version in force, whether it tripped, and what its quality checks say, of all processes."""
    from lagkv_ext.serving.rollout.breaker import Breaker
    from lagkv_ext.serving.rollout.evidence import Evidence

    store = _store(file)
    with _refusing():
        policy = _there(store.current(), file)
        trip = store.trip_in_force(policy.version)
        breaker = Breaker(policy.guard)
        for check in Evidence(store.checks_of(policy.version), policy.guard.window).new():
            breaker.add(check)
    tripped = trip is not None and trip.version >= policy.version
    kl = breaker.kl if breaker.kl is None or breaker.kl < float("inf") else None
    quality = {"checks": breaker.checks, "agreement": breaker.agreement, "kl": kl}
    if as_json:
        told = dataclasses.asdict(trip) if trip is not None and tripped else None
        data = {"version": policy.version, **policy.content, "trip": told, **quality}
        typer.echo(json.dumps(data, indent=2))
        return
    typer.echo(policy.text, nl=False)
    if trip is not None and tripped:
        typer.echo(
            f"TRIPPED {trip.time} by process {trip.pid}: {trip.reason}; every request gets the full cache"
        )
    elif not policy.enabled:
        typer.echo("off: every request gets the full cache")
    if breaker.checks:
        shown = "infinite" if kl is None else f"{kl:.4f} nats per token"
        typer.echo(
            f"checks: {breaker.checks} in the window, agreement {breaker.agreement:.4f}, KL {shown}"
            f" (guard: at least {policy.guard.min_agreement:g}, at most {policy.guard.max_kl:g})"
        )
    else:
        typer.echo("checks: none yet")


@app.command()
def history(file: File = DEFAULT) -> None:
    """Every version, the first one first, and why it tripped."""
    from lagkv_ext.serving.rollout.policy import RolloutError
    from lagkv_ext.serving.rollout.store import stamp

    store = _store(file)
    with _refusing():
        numbers = store.versions()
        if not numbers:
            raise RolloutError(f"{file} has no history: there is no {store.history}")
        before: Policy | None = None
        for number in numbers:
            written = stamp(store.written(number))
            try:
                policy = store.version(number)
                trip = store.trip_of(number)
            except RolloutError as error:
                typer.echo(f"{number:6}  {written}  {error}")
                continue
            typer.echo(f"{number:6}  {written}  {', '.join(_changes(before, policy)) or 'as before'}")
            if trip is not None:
                typer.echo(f"        tripped {trip.time}: {trip.reason}")
            before = policy


# -- what the commands share


def _write(file: Path, make: Callable[[Policy | None], Policy], dry_run: bool, *, over: bool = False) -> None:
    from lagkv_ext.serving.rollout.policy import checked

    store = _store(file)
    tripped: Trip | None = None

    def make_checked(old: Policy | None) -> Policy:
        nonlocal tripped
        tripped = store.trip_or_doubt(old)  # writing removes it
        return checked(make(old))

    with _refusing():
        names = _names_of(store.path)
        old, new = store.write(make_checked, over=over, dry_run=dry_run)
    if old == new:
        typer.echo(f"version {new.version} of {file} says so already: nothing was written")
        return
    would = "would be " if dry_run else ""
    came = "" if old is None else f" from version {old.version}"
    link = f" (a link to {store.path})" if file.is_symlink() else ""
    typer.echo(f"{file}{link}{came}: version {new.version} {would}written")
    if names > 1:
        typer.echo(
            f"warning: {store.path} had {names} names (hard links). Servers that read it by another name do not see "
            "this version: use symbolic links",
            err=True,
        )
    for change in _changes(old, new):
        typer.echo(f"  {change}")
    if old is not None and tripped is not None and tripped.version >= old.version:
        typer.echo(
            f"  version {old.version} had tripped ({tripped.reason}); version {new.version} begins anew"
        )


def _changes(old: Policy | None, new: Policy) -> list[str]:
    def flat(policy: Policy | None) -> dict[str, Any]:
        data = {} if policy is None else policy.content
        nested = {
            f"{name}.{k}": v
            for name in ("settings", "guard")
            for k, v in (data.pop(name, None) or {}).items()
        }
        return {**data, **nested}

    a, b = flat(old), flat(new)
    if old is None:
        return [f"{name} {json.dumps(value)}" for name, value in b.items()]
    return [
        f"{name} {json.dumps(a[name]) if name in a else 'unset'} -> {json.dumps(b[name]) if name in b else 'unset'}"
        for name in sorted(dict.fromkeys([*a, *b]), key=lambda x: list(new.content).index(x.split(".")[0]))
        if a.get(name) != b.get(name) or (name in a) != (name in b)
    ]


def _before(store: Store, old: Policy) -> Policy:
    from lagkv_ext.serving.rollout.policy import RolloutError

    for number in reversed(store.versions()):
        if number < old.version and store.trip_of(number) is None:
            found = store.version(number)
            if found.content != old.content:
                return found
    raise RolloutError(f"there is no version before {old.version} that differs and did not trip; see history")


def _guard(old: Any, *given: Any) -> Any:
    names = ("min_agreement", "max_kl", "min_checks", "window", "check_share", "max_errors")
    changed = {name: value for name, value in zip(names, given, strict=True) if value is not None}
    if changed.get("max_errors") == 0:
        changed["max_errors"] = None
    return dataclasses.replace(old, **changed)


def _settings(path: Path, model: Path | None) -> dict[str, Any]:
    from lagkv_ext import read_settings
    from lagkv_ext.serving.rollout.policy import RolloutError, check_values

    settings = read_settings(path)
    check_values(settings, f"the settings file {path}")
    if model is not None:
        from transformers import AutoConfig

        from lagkv_ext import LagKVCache

        try:
            LagKVCache(AutoConfig.from_pretrained(model, local_files_only=True), **settings)
        except (OSError, TypeError, ValueError) as error:
            raise RolloutError(f"the settings file {path} with the model {model}: {error}") from error
    return settings


def _there(policy: Policy | None, file: Path) -> Policy:
    from lagkv_ext.serving.rollout.policy import RolloutError

    if policy is None:
        raise RolloutError(f"there is no rollout file {file}; make one with lagkv rollout init {file}")
    return policy


def _store(file: Path) -> Store:
    from lagkv_ext.serving.rollout.store import Store

    with _refusing():
        return Store(file)


def _names_of(path: Path) -> int:
    try:
        return path.stat().st_nlink
    except FileNotFoundError:
        return 0


class _refusing:
    """What the operator can mend ends with exit status 2 and the reason."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, ValueError)):
            _refuse(error)


def _refuse(message: object) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)
