"""The command ``lagkv rollout review``: two answers to a prompt, blind and in random order, and a person's verdict."""

from __future__ import annotations

import getpass
import random
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from lagkv_ext.serving.rollout.command_line import DEFAULT, File, refuse, refusing, store_of, there

if TYPE_CHECKING:
    from lagkv_ext.serving.rollout.samples import Sample, SampleFolder

_KEYS = {"1": "first", "2": "second", "s": "same", "k": "skip", "q": "quit"}


def review(
    file: File = DEFAULT,
    reviewer: Annotated[str | None, typer.Option(help="Your name; the user's by default.")] = None,
    count: Annotated[int | None, typer.Option(help="Samples to judge at most.", min=1)] = None,
    variant: Annotated[str | None, typer.Option(help="Only samples of this variant.")] = None,
    characters: Annotated[
        int, typer.Option(help="Characters shown of the prompt: its end; 0 for all.", min=0)
    ] = 2000,
) -> None:
    """Judge stored answers: which of two is better, without knowing which cache gave it. Stop at any time with q."""
    from lagkv_ext.serving.rollout.samples import SampleFolder, Verdict
    from lagkv_ext.serving.rollout.store import now

    store = store_of(file)
    name = reviewer or getpass.getuser()
    with refusing():
        policy = there(store.current(), file)
        if policy.samples is None:
            refuse(f"{file} stores no samples: switch them on with lagkv rollout set --sample-share")
        folder = SampleFolder(store, policy.samples)
        done = {x.sample for x in folder.verdicts() if x.reviewer == name}
        waiting = [x for x in folder.names() if x not in done and variant in (None, x.split(".", 1)[1][:-5])]
    random.SystemRandom().shuffle(waiting)
    recorded = 0
    for sample in _readable(folder, waiting[:count]):
        order = ["full", "compressed"]
        random.SystemRandom().shuffle(order)
        answer = _ask(sample, order, characters, f"{recorded + 1} of {len(waiting[:count])}")
        if answer == "quit":
            break
        if answer == "skip":
            continue
        chosen = "same" if answer == "same" else order[answer == "second"]
        with refusing():
            folder.record(Verdict(sample.id, sample.variant, sample.version, chosen, name, order[0], now()))
        recorded += 1
    left = len(waiting) - recorded
    typer.echo(f"{recorded} verdicts recorded, {left} samples left for {name}")


def _readable(folder: SampleFolder, names: list[str]) -> Iterator[Sample]:
    for name in names:
        try:
            yield folder.read(name)
        except (OSError, ValueError) as error:
            typer.echo(f"left out: {error}", err=True)


def _ask(sample: Sample, order: list[str], characters: int, progress: str) -> str:
    prompt = sample.prompt
    if characters and len(prompt) > characters:
        prompt = f"[{len(prompt) - characters} characters before]\n{prompt[-characters:]}"
    texts = {"full": sample.full, "compressed": sample.compressed}
    typer.echo(f"\n=== {progress} ===\n\n--- prompt ---\n{printable(prompt)}")
    for number, which in enumerate(order, 1):
        typer.echo(f"\n--- answer {number} ---\n{printable(texts[which])}")
    while True:
        try:
            typer.echo("\nbetter: 1, 2, s(ame); k: skip, q: stop > ", nl=False)
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        if not line:  # the end of the input: as q
            typer.echo("")
            return "quit"
        if (key := line.strip().lower()[:1]) in _KEYS:
            return _KEYS[key]


def printable(text: str) -> str:
    """Text that cannot control the terminal: control characters, but tabs and line breaks, as their codes."""
    return "".join(x if x.isprintable() or x in "\n\t" else x.encode("unicode_escape").decode() for x in text)
