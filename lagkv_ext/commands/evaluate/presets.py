"""Named evaluations: tasks with sizes, methods, ratios."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lagkv_ext.commands.evaluate.tasks import Spec
from lagkv_ext.commands.evaluate.types import Setting

RATIOS = (0.5, 0.25, 0.125)
BASELINES = ("window", "random", "keynorm", "keydiff", "h2o", "snapkv")
LAGKV = ("lagkv-std", "lagkv-cosine", "lagkv-blend-smooth3-head")


@dataclass(frozen=True)
class Preset:
    description: str
    specs: tuple[Spec, ...]
    methods: tuple[str, ...]
    keep_ratios: tuple[float, ...] = RATIOS
    lag_sizes: tuple[int, ...] = (128,)
    extra: tuple[Setting, ...] = ()


def settings(
    methods: tuple[str, ...],
    keep_ratios: tuple[float, ...],
    lag_sizes: tuple[int, ...],
    sink_size: int = 16,
    extra: tuple[Setting, ...] = (),
) -> list[Setting]:
    """Every method at every size, the same for all methods."""
    grid = [
        Setting(method, ratio, lag, sink_size)
        for ratio in keep_ratios
        for lag in lag_sizes
        for method in methods
        if method != "full"
    ]
    return [*grid, *extra]


def in_pieces(settings: list[Setting], chunks: tuple[str, ...]) -> list[Setting]:
    """Every setting with its context read in each of these ways: "whole", in chunks, or as in decoding."""
    return [
        s
        if chunk == "whole"
        else dataclasses.replace(
            s, options=(*s.options, ("chunk", chunk if chunk == "decode" else int(chunk)))
        )
        for s in settings
        for chunk in chunks
    ]


def _small(size: int, prompts: int) -> tuple[Spec, ...]:
    """The tasks on which a model of 270M parameters has something to lose, with few questions each."""
    return (
        Spec("facts", size, prompts, (("facts", 3),)),
        Spec("codes", size, prompts, (("asked", 3),)),
        Spec("passkey", size, prompts),
        Spec("multikey-uuid", size, prompts, (("asked", 1),)),
        Spec("multikey-digits", size, prompts, (("asked", 1),)),
        Spec("words-common", size, prompts),
        Spec("fidelity", size, prompts, (("tokens", 48),)),
    )


def _recursion() -> tuple[Setting, ...]:
    """Contexts read in one piece (compressed once), in chunks, and as in decoding (compressed recursively)."""
    return tuple(in_pieces([Setting(m, 0.25) for m in LAGKV], ("whole", "512", "128", "decode")))


def _ablation() -> tuple[Setting, ...]:
    """Around ``keep_ratio=0.25, lag_size=128, sink_size=16``, one thing at a time."""
    out = [
        Setting(f"lagkv-{score}{part}", 0.25)
        for part in ("", "-k", "-v", "-head")
        for score in ("std", "cosine")
    ]
    for score in ("std", "cosine"):
        # Smaller partitions leave a smaller window: `as_L` spends that on more tokens of each partition.
        out += [
            Setting(f"lagkv-{score}", 0.25, lag_size=lag, options=(("as_L", 128),)) for lag in (16, 32, 64)
        ]
        out += [Setting(f"lagkv-{score}", 0.25, lag_size=lag) for lag in (64, 256)]
        out += [Setting(f"lagkv-{score}", 0.25, sink_size=sink) for sink in (0, 4, 64)]
    return (*out, Setting("keydiff", 0.25), Setting("keydiff-partition", 0.25), Setting("random", 0.25))


PRESETS = {
    "quick": Preset(
        "seven tasks at 1,000 tokens, five prompts each: within 10 minutes on 2 cores",
        _small(1000, 5),
        (*LAGKV, *BASELINES),
    ),
    "standard": Preset(
        "every task at 2,000 tokens, eight prompts each",
        (
            Spec("passkey", 2000, 8),
            Spec("passkey", 2000, 8, (("key_digits", 16),)),
            Spec("facts", 2000, 8),
            Spec("facts-ja", 2000, 8, (("facts", 3),)),
            Spec("facts-zh", 2000, 8, (("facts", 3),)),
            Spec("letter"),
            Spec("codes", 2000, 8),
            Spec("multikey-uuid", 2000, 8),
            Spec("multikey-digits", 2000, 8),
            Spec("multikey-words", 2000, 8),
            Spec("variables", 2000, 8),
            Spec("words-common", 2000, 8),
            Spec("words-frequent", 2000, 8),
            Spec("fidelity", 1500, 8, (("tokens", 64),)),
        ),
        (*LAGKV, *BASELINES),
    ),
    "heatmap": Preset(
        "passkeys of 64 digits over depth and length, as in the paper",
        tuple(
            Spec("passkey", size, 5, (("depths", (0.1, 0.3, 0.5, 0.7, 0.9)),))
            for size in (500, 1000, 2000, 4000)
        ),
        LAGKV,
        (0.25,),
    ),
    "ablation": Preset(
        "L, K against V, budgets shared over a head, sink size, at 1/4",
        (
            Spec("facts", 1000, 5, (("facts", 3),)),
            Spec("passkey", 1000, 5),
            Spec("multikey-uuid", 1000, 5, (("asked", 1),)),
            Spec("fidelity", 1000, 5, (("tokens", 48),)),
        ),
        (),
        (),
        extra=_ablation(),
    ),
    "recursion": Preset(
        "one-shot against recursive compression, in chunks and in decoding, at 1/4",
        (
            Spec("facts", 1000, 5, (("facts", 3),)),
            Spec("passkey", 1000, 5),
            Spec("facts-written", 1000, 5, (("facts", 3),)),
            Spec("fidelity", 1000, 5, (("tokens", 48),)),
        ),
        (),
        (),
        extra=_recursion(),
    ),
}
