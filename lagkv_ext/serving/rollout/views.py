"""The commands ``lagkv rollout show``, ``history`` and ``compare``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lagkv_ext.serving.rollout.command_line import DEFAULT, File, changes, refusing, store_of, there

if TYPE_CHECKING:
    from lagkv_ext.serving.rollout.judge import Judge
    from lagkv_ext.serving.rollout.policy import Policy
    from lagkv_ext.serving.rollout.store import Store, Trip

Json = Annotated[bool, typer.Option("--json", help="As JSON.")]


def show(file: File = DEFAULT, as_json: Json = False) -> None:
    """Print the version in force, and for each variant whether it tripped and what the checks of all processes say."""
    from lagkv_ext.serving.rollout.policy import rung_of
    from lagkv_ext.serving.rollout.samples import SampleFolder

    store = store_of(file)
    with refusing():
        policy = there(store.current(), file)
        trips = store.trips_in_force(policy)
        judges = judges_of(store, policy)
        reviews = {} if policy.samples is None else SampleFolder(store, policy.samples).counts()
    rung = rung_of(policy)
    now: dict[str, dict[str, Any]] = {}
    for name, judge in judges.items():
        trip = trips.get(name)
        now[name] = {"trip": None if trip is None else dataclasses.asdict(trip), **judge.numbers()}
        if policy.ladder is not None and policy.ladder.variant == name:
            now[name]["rung"] = rung
        count, verdicts = reviews.get(name, (0, {}))
        now[name] |= {"samples": count, "reviews": verdicts}
    if as_json:
        written = None if policy.written is None else dataclasses.asdict(policy.written)
        data = {"version": policy.version, **policy.content, "written": written, "now": now}
        typer.echo(json.dumps(data, indent=2))
        return
    typer.echo(policy.text, nl=False)
    if not policy.enabled:
        typer.echo("off: every request gets the full cache")
    for name, judge in judges.items():
        _tell(name, policy, judge, trips.get(name), rung)
    for name, (count, verdicts) in reviews.items():
        given = ", ".join(f"{x} {n}" for x, n in verdicts.items()) or "none"
        typer.echo(f"{name}: {count} samples for review, verdicts: {given}")


def _tell(name: str, policy: Policy, judge: Judge, trip: Trip | None, rung: int | None) -> None:
    if trip is not None:
        typer.echo(
            f"{name}: TRIPPED {trip.time} by process {trip.pid}: {trip.reason}; its requests get the full cache"
        )
    if policy.ladder is not None and policy.ladder.variant == name:
        typer.echo(
            f"{name}: rung {rung} of 0 to {len(policy.ladder.rungs) - 1}, target {policy.ladder.target_agreement:g}"
        )
    if not judge.checks:
        typer.echo(f"{name}: no checks yet")
        return
    found, guard = judge.numbers(), policy.guard
    kl = "infinite" if found["kl"] is None else f"{found['kl']:.4f} nats per token"
    typer.echo(
        f"{name}: {judge.checks} checks, agreement {judge.agreement:.4f} over the last {judge.in_window}, "
        f"at least {found['agreement_at_least']:.3f} and at most {found['agreement_at_most']:.3f}; KL {kl} "
        f"(guard: at least {guard.min_agreement:g}, at most {guard.max_kl:g}, level {guard.level:g})"
    )


def judges_of(store: Store, policy: Policy) -> dict[str, Judge]:
    """Lists what the checks of a version show of each variant."""
    from lagkv_ext.serving.rollout.evidence import Evidence
    from lagkv_ext.serving.rollout.judge import Judge

    judges = {name: Judge(policy.guard) for name in policy.variants}
    for check in Evidence(store.checks_of(policy.version)).new():
        if check.variant in judges:
            judges[check.variant].add(check)
    return judges


def compare(
    file: File = DEFAULT,
    log: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file of request records as lines of JSON (lagkv_ext.serving.log); may be repeated."
        ),
    ] = None,
    level: Annotated[
        float, typer.Option(help="Probability that one interval is ever wrong.", min=1e-6, max=0.5)
    ] = 0.05,
    as_json: Json = False,
) -> None:
    """Print how variants differ in agreement, KL, duration and memory, with intervals, and what of it is noise."""
    from lagkv_ext.serving.rollout.compare import METRICS, differences, observe, sign_test
    from lagkv_ext.serving.rollout.samples import SampleFolder

    store = store_of(file)
    with refusing():
        policy = there(store.current(), file)
        found = observe(store, policy, log or [])
        reviews = {} if policy.samples is None else SampleFolder(store, policy.samples).counts()
    rows = differences(found, level)
    people = {
        name: {**verdicts, "p": sign_test(verdicts.get("full", 0), verdicts.get("compressed", 0))}
        for name, (_, verdicts) in reviews.items()
        if verdicts
    }
    if as_json:
        data = [{**dataclasses.asdict(x), "verdict": x.verdict} for x in rows]
        typer.echo(json.dumps({"level": level, "differences": data, "reviews": people}, indent=2))
        return
    for text in found.left_out:
        typer.echo(f"left out: {text}", err=True)
    if not rows:
        typer.echo("nothing to compare: no two variants have checks, and no --log has their requests")
    units = {name: f" {unit}" if unit else "" for name, unit, _ in METRICS}
    for x in rows:
        between = f"{x.metric}: {x.second} - {x.first}"
        if x.low is None or x.high is None:
            typer.echo(f"{between}: too few ({x.counts[1]} and {x.counts[0]})")
            continue
        middle, half = (x.low + x.high) / 2, (x.high - x.low) / 2
        typer.echo(
            f"{between}: {middle:+.4g} +- {half:.2g}{units[x.metric]}, {x.verdict} "
            f"({x.means[1]:.4g} of {x.counts[1]}, {x.means[0]:.4g} of {x.counts[0]})"
        )
    for name, verdicts in people.items():
        counted = ", ".join(f"{k} {verdicts.get(k, 0)}" for k in ("full", "compressed", "same"))
        said = "noise" if verdicts["p"] >= level else "a difference"
        typer.echo(f"reviews of {name}: {counted}; {said} (p {verdicts['p']:.2g}, once, at the end)")


def history(file: File = DEFAULT) -> None:
    """Print every version from the first on: what changed, who wrote it and why, and what tripped."""
    from lagkv_ext.serving.rollout.policy import RolloutError
    from lagkv_ext.serving.rollout.store import stamp

    store = store_of(file)
    with refusing():
        numbers = store.versions()
        if not numbers:
            raise RolloutError(f"{file} has no history: there is no {store.history}")
        before: Policy | None = None
        for number in numbers:
            time = stamp(store.written(number))
            try:
                policy = store.version(number)
                trips = store.trips_of(policy)
            except RolloutError as error:
                typer.echo(f"{number:6}  {time}  {error}")
                continue
            typer.echo(f"{number:6}  {time}  {', '.join(changes(before, policy)) or 'as before'}")
            if policy.written is not None and (policy.written.by != "operator" or policy.written.why):
                typer.echo(f"        by {policy.written.by}: {policy.written.why}")
            for trip in trips:
                typer.echo(f"        {trip.variant} tripped {trip.time}: {trip.reason}")
            before = policy
