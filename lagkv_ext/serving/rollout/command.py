"""The commands ``lagkv rollout ...`` that write versions; ``views`` has those that only read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lagkv_ext.serving.rollout.command_line import DEFAULT, File, changes, refuse, refusing, store_of, there

if TYPE_CHECKING:
    from lagkv_ext.serving.rollout.policy import Guard, LadderRules, Policy, Samples
    from lagkv_ext.serving.rollout.store import Store

app = typer.Typer(
    help="Compress a share of a server's requests: grow it, switch it off, go back, without a restart.",
    no_args_is_help=True,
)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would change, write nothing.")]
Why = Annotated[str | None, typer.Option(help="A reason, for the history.")]
Model = Annotated[
    Path | None, typer.Option(help="A model's folder: try the settings with its config.json too.")
]


def _option(panel: str, text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=panel)


Agreement = Annotated[float | None, _option("Guard", "Trip below this mean agreement, over 0 to 1.")]
Kl = Annotated[float | None, _option("Guard", "Trip above this mean KL, nats per token.")]
Level = Annotated[float | None, _option("Guard", "Probability of a false trip of a version, over 0 to 0.5.")]
Recover = Annotated[bool | None, _option("Guard", "Come back by itself where checks show that it may.")]
Window = Annotated[int | None, _option("Guard", "Most recent checks that shown means are of.")]
CheckShare = Annotated[float | None, _option("Guard", "Share of the compressed requests that is checked.")]
Errors = Annotated[int | None, _option("Guard", "Trip at so many failures in one process; 0 for no bound.")]
LadderFile = Annotated[
    Path | None, _option("Ladder", "A lagkv-ladder.json: let the ratio adapt along its rungs.")
]
Target = Annotated[float | None, _option("Ladder", "Smaller above this agreement, larger below it.")]
LadderLevel = Annotated[float | None, _option("Ladder", "Probability of a wrong move, over 0 to 0.5.")]
PerDay = Annotated[int | None, _option("Ladder", "Moves to a smaller cache in 24 hours.")]
Hold = Annotated[float | None, _option("Ladder", "Hours before a rung that failed is tried again.")]
SampleShare = Annotated[
    float | None,
    _option("Samples", "Share of the compressed requests whose text is stored for review; 0 for none."),
]
MaxSamples = Annotated[int | None, _option("Samples", "Samples in the folder.")]
SamplesFolder = Annotated[str | None, _option("Samples", "Folder, beside the rollout file or absolute.")]


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="The rollout file to make.")] = DEFAULT,
    settings: Annotated[
        Path | None, typer.Option(help="A lagkv.json. By default the first rung of --ladder, or lagkv.json.")
    ] = None,
    share: Annotated[float, typer.Option(help="Of all requests, from 0 to 1.")] = 0.01,
    min_prompt_tokens: Annotated[int, typer.Option(help="Shorter prompts get the full cache.")] = 0,
    min_agreement: Agreement = None,
    max_kl: Kl = None,
    level: Level = None,
    recover: Recover = None,
    window: Window = None,
    check_share: CheckShare = None,
    max_errors: Errors = None,
    ladder: LadderFile = None,
    target_agreement: Target = None,
    ladder_level: LadderLevel = None,
    smaller_per_day: PerDay = None,
    hold_hours: Hold = None,
    sample_share: SampleShare = None,
    max_samples: MaxSamples = None,
    samples_folder: SamplesFolder = None,
    model: Model = None,
    why: Why = None,
    dry_run: DryRun = False,
) -> None:
    """Make a rollout file from the settings or the ladder that `lagkv evaluate` wrote."""
    from lagkv_ext.serving.rollout.policy import MAIN, Guard, Policy, RolloutError, Variant

    guard = _guard(Guard(), min_agreement, max_kl, level, recover, window, check_share, max_errors)
    rules = (target_agreement, ladder_level, smaller_per_day, hold_hours)
    samples = (sample_share, max_samples, samples_folder)

    def make(old: Policy | None) -> Policy:
        if old is not None:
            raise RolloutError(
                f"{file} is there already, version {old.version}: change it with lagkv rollout set"
            )
        found = _ladder(None, ladder, MAIN, rules)
        if settings is None and found is not None:
            first = dict(found.rungs[0])
            _try_with(model, first, f"the first rung of {ladder}")
        else:
            first = _settings(settings or Path("lagkv.json"), model)
        variants = {MAIN: Variant(share, first)}
        return Policy(1, True, variants, min_prompt_tokens, guard, found, _samples(None, *samples))

    _write(file, make, dry_run, why=why)


@app.command("set")
def set_(
    file: File = DEFAULT,
    variant: Annotated[
        str | None,
        typer.Option(help="The variant that --share and --settings are for; a new name adds one."),
    ] = None,
    share: Annotated[float | None, typer.Option(help="Of all requests, from 0 to 1.")] = None,
    settings: Annotated[Path | None, typer.Option(help="A lagkv.json in place of the settings.")] = None,
    drop: Annotated[str | None, typer.Option(help="Remove a variant.")] = None,
    min_prompt_tokens: Annotated[
        int | None, typer.Option(help="Prompts shorter than this get the full cache.")
    ] = None,
    min_agreement: Agreement = None,
    max_kl: Kl = None,
    level: Level = None,
    recover: Recover = None,
    window: Window = None,
    check_share: CheckShare = None,
    max_errors: Errors = None,
    ladder: LadderFile = None,
    no_ladder: Annotated[
        bool, typer.Option("--no-ladder", help="Stop adapting.", rich_help_panel="Ladder")
    ] = False,
    target_agreement: Target = None,
    ladder_level: LadderLevel = None,
    smaller_per_day: PerDay = None,
    hold_hours: Hold = None,
    sample_share: SampleShare = None,
    max_samples: MaxSamples = None,
    samples_folder: SamplesFolder = None,
    model: Model = None,
    why: Why = None,
    dry_run: DryRun = False,
) -> None:
    """Change the share, or anything else, in a new version. What tripped begins anew; with --variant only that one."""
    guard = (min_agreement, max_kl, level, recover, window, check_share, max_errors)
    rules = (target_agreement, ladder_level, smaller_per_day, hold_hours)
    samples = (sample_share, max_samples, samples_folder)
    given = (share, settings, drop, min_prompt_tokens, *guard, ladder, no_ladder or None, *rules, *samples)
    if all(x is None for x in given):
        refuse("say what to set: --share, --settings, an option of the guard, ... (--help)")

    def make(old: Policy | None) -> Policy:
        from lagkv_ext.serving.rollout.policy import RolloutError

        new = there(old, file)
        if share is not None or settings is not None:
            new = _with_variant(new, variant, share, settings, model)
        if drop is not None:
            if drop not in new.variants:
                raise RolloutError(
                    f"there is no variant {drop!r} to drop; there are {', '.join(new.variants)}"
                )
            new = dataclasses.replace(new, variants={k: v for k, v in new.variants.items() if k != drop})
        rung = _ladder(None if no_ladder else new.ladder, ladder, variant or _only(new), rules)
        if min_prompt_tokens is not None:
            new = dataclasses.replace(new, min_prompt_tokens=min_prompt_tokens)
        return dataclasses.replace(
            new, guard=_guard(new.guard, *guard), ladder=rung, samples=_samples(new.samples, *samples)
        )

    _write(file, make, dry_run, why=why, anew=None if variant is None else (variant,))


@app.command()
def off(file: File = DEFAULT, why: Why = None, dry_run: DryRun = False) -> None:
    """Give every request the full cache. Works also where the file is damaged or gone, from its history."""
    _write(
        file, lambda old: dataclasses.replace(there(old, file), enabled=False), dry_run, why=why, over=True
    )


@app.command()
def on(file: File = DEFAULT, why: Why = None, dry_run: DryRun = False) -> None:
    """Compress again after off, with the variants of before. What tripped begins anew."""
    _write(file, lambda old: dataclasses.replace(there(old, file), enabled=True), dry_run, why=why)


@app.command()
def back(
    version: Annotated[
        int | None, typer.Argument(help="By default the last one before that differs and did not trip.")
    ] = None,
    file: File = DEFAULT,
    even_if_tripped: Annotated[
        bool, typer.Option("--even-if-tripped", help="Also to a version that tripped.")
    ] = False,
    why: Why = None,
    dry_run: DryRun = False,
) -> None:
    """Write a new version with the content of an older one."""
    store = store_of(file)

    def make(old: Policy | None) -> Policy:
        from lagkv_ext.serving.rollout.policy import RolloutError

        old = there(old, file)
        found = _before(store, old) if version is None else store.version(version)
        if (trips := store.trips_of(found)) and not even_if_tripped:
            raise RolloutError(
                f"version {found.version} tripped: {trips[0].reason}; --even-if-tripped takes it anyway"
            )
        typer.echo(f"content of version {found.version}")
        return found

    _write(file, make, dry_run, why=why, over=True)


# -- shared by these commands


def _write(
    file: Path,
    make: Callable[[Policy | None], Policy],
    dry_run: bool,
    *,
    why: str | None,
    over: bool = False,
    anew: Collection[str] | None = None,
) -> None:
    from lagkv_ext.serving.rollout.policy import Written, checked
    from lagkv_ext.serving.rollout.store import now

    store = store_of(file)
    tripped: dict[str, Any] = {}

    def make_checked(old: Policy | None) -> Policy:
        if old is not None:
            tripped.update(store.trips_in_force(old))  # writing removes them
        written = Written("operator", now(), why or "")
        return dataclasses.replace(checked(make(old)), written=written)

    with refusing():
        names = _names_of(store.path)
        old, new = store.write(make_checked, over=over, dry_run=dry_run, anew=anew)
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
    for change in changes(old, new):
        typer.echo(f"  {change}")
    for name, trip in tripped.items():
        begins = anew is None or name in anew
        then = f"version {new.version} begins anew" if begins else "and stays so"
        typer.echo(f"  {name} had tripped ({trip.reason}); {then}")


def _with_variant(
    policy: Policy, name: str | None, share: float | None, settings: Path | None, model: Path | None
) -> Policy:
    from lagkv_ext.serving.rollout.policy import RolloutError, Variant

    name = name or _only(policy)
    if name is None:
        raise RolloutError(f"say which variant, with --variant: there are {', '.join(policy.variants)}")
    given: dict[str, Any] = {
        "share": share,
        "settings": None if settings is None else _settings(settings, model),
    }
    if name not in policy.variants:
        if None in given.values():
            raise RolloutError(f"the new variant {name!r} needs --share and --settings")
        return dataclasses.replace(policy, variants={**policy.variants, name: Variant(**given)})
    return policy.changed(name, **{k: v for k, v in given.items() if v is not None})


def _only(policy: Policy) -> str | None:
    return next(iter(policy.variants)) if len(policy.variants) == 1 else None


def _before(store: Store, old: Policy) -> Policy:
    from lagkv_ext.serving.rollout.policy import RolloutError

    for number in reversed(store.versions()):
        if number < old.version:
            found = store.version(number)
            if found.content != old.content and not store.trips_of(found):
                return found
    raise RolloutError(f"there is no version before {old.version} that differs and did not trip; see history")


def _guard(old: Guard, *given: Any) -> Guard:
    names = ("min_agreement", "max_kl", "level", "recover", "window", "check_share", "max_errors")
    changed = {name: value for name, value in zip(names, given, strict=True) if value is not None}
    if changed.get("max_errors") == 0:
        changed["max_errors"] = None
    return dataclasses.replace(old, **changed)


def _ladder(
    old: LadderRules | None, file: Path | None, variant: str | None, rules: tuple[Any, ...]
) -> LadderRules | None:
    from lagkv_ext.serving.rollout.ladder import read_ladder
    from lagkv_ext.serving.rollout.policy import LadderRules, RolloutError

    names = ("target_agreement", "level", "smaller_per_day", "hold_hours")
    given = {name: value for name, value in zip(names, rules, strict=True) if value is not None}
    if file is not None:
        if variant is None:
            raise RolloutError("say which variant the ladder is for, with --variant")
        rungs = tuple(x.settings for x in read_ladder(file).rungs)
        old = (
            LadderRules(rungs, variant)
            if old is None
            else dataclasses.replace(old, rungs=rungs, variant=variant)
        )
    if old is None:
        if given:
            raise RolloutError("there is no ladder: give one with --ladder")
        return None
    return dataclasses.replace(old, **given)


def _samples(
    old: Samples | None, share: float | None, most: int | None, folder: str | None
) -> Samples | None:
    from lagkv_ext.serving.rollout.policy import RolloutError, Samples

    if share == 0:
        return None
    named = (("share", share), ("max", most), ("folder", folder))
    given: dict[str, Any] = {name: value for name, value in named if value is not None}
    if old is None:
        if given and share is None:
            raise RolloutError("no samples are stored: switch them on with --sample-share")
        return Samples(**given) if given else None
    return dataclasses.replace(old, **given)


def _settings(path: Path, model: Path | None) -> dict[str, Any]:
    from lagkv_ext import read_settings
    from lagkv_ext.serving.rollout.policy import check_values

    settings = read_settings(path)
    check_values(settings, f"the settings file {path}")
    _try_with(model, settings, f"the settings file {path}")
    return settings


def _try_with(model: Path | None, settings: dict[str, Any], source: str) -> None:
    from lagkv_ext.serving.rollout.policy import RolloutError

    if model is not None:
        from transformers import AutoConfig

        from lagkv_ext import LagKVCache

        try:
            LagKVCache(AutoConfig.from_pretrained(model, local_files_only=True), **settings)
        except (OSError, TypeError, ValueError) as error:
            raise RolloutError(f"{source} with the model {model}: {error}") from error


def _names_of(path: Path) -> int:
    try:
        return path.stat().st_nlink
    except FileNotFoundError:
        return 0


# Commands that write no version, each in a file of its own.
from lagkv_ext.serving.rollout.review import review as _review  # noqa: E402
from lagkv_ext.serving.rollout.views import compare as _compare  # noqa: E402
from lagkv_ext.serving.rollout.views import history as _history  # noqa: E402
from lagkv_ext.serving.rollout.views import show as _show  # noqa: E402

for _command in (_show, _history, _compare, _review):
    app.command()(_command)
