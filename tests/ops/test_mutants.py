"""The properties find faults: the reference with one fault planted fails at least one of them.

That the reference without a fault passes all of them is shown by the suite itself, where it is one of the backends.
"""

from __future__ import annotations

import inspect
import types

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from lagkv_ext import reference
from tests.ops.backends import Backend
from tests.ops.cases import FINITE_KINDS, TRAPS, Case, Layout, cases
from tests.ops.properties import CASE_CHECKS, check_compact, check_repeatable, check_topk_index

# Name of the fault: text of reference.py, and what replaces it.
FAULTS = {
    "ties: the higher position wins": (
        "torch.sort(score, dim=-1, descending=True, stable=True).indices",
        "score.shape[-1] - 1 - torch.sort(score.flip(-1), dim=-1, descending=True, stable=True).indices",
    ),
    "NaN ranks lowest": (
        "torch.sort(score,",
        "torch.sort(score.nan_to_num(-torch.inf),",
    ),
    "the lowest scores are kept": ("descending=True, stable=True", "descending=False, stable=True"),
    "kept tokens in score order": ("order[..., :keep].sort(dim=-1).values", "order[..., :keep]"),
    "one token too few is ranked": (
        "torch.sort(score,",
        "torch.sort(score[..., :-1] if keep < score.shape[-1] else score,",
    ),
    "no window": ("position[:, :, window:]]", "position[:, :, window + lag_size :]]"),
    "no remainder": ("position[:, :, window:]]", "position[:, :, window : window + lag_size]]"),
    "sink one too short": (
        "x[:, :, start : start + count * lag_size]",
        "x[:, :, max(start - 1, 0) : max(start - 1, 0) + count * lag_size]",
    ),
    "a single partition is compressed": (
        "    if compressed == 0:",
        "    if compressed == 0 and length >= start + lag_size:\n"
        "        index = torch.cat([torch.arange(start), torch.arange(start + 1, length)]).to(torch.int32)\n"
        "        return index.expand(batch, heads, -1).clone()\n"
        "    if compressed == 0:",
    ),
    "bounds of the own partition": ("tiles[:, :, 1:].amin", "tiles[:, :, :-1].amin"),
    "bounds of the first partition": (
        "    hi = tiles[:, :, 1:].amax(dim=3, keepdim=True)",
        "    hi = tiles[:, :, :1].amax(dim=3, keepdim=True).expand_as(lo)",
    ),
    "bounds without the last token": (
        "tiles[:, :, 1:].amax(dim=3",
        "tiles[:, :, 1:, : max(1, tiles.shape[3] - 1)].amax(dim=3",
    ),
    "biased deviation": ("y.std(dim=-1)", "y.std(dim=-1, correction=0)"),
    "deviation over one channel too few": ("y.std(dim=-1)", "y[..., : max(2, y.shape[-1] - 1)].std(dim=-1)"),
    "no softmax": ("return torch.softmax(y.std(dim=-1), dim=-1)", "return y.std(dim=-1)"),
    "softmax over channels' partitions": ("y.std(dim=-1), dim=-1)", "y.std(dim=-1), dim=-2)"),
    "constant channel counts as one": ("torch.where(hi == lo, 0.0,", "torch.where(hi == lo, 1.0,"),
    "constant channel divides by zero": ("torch.where(hi == lo, 0.0, (", "torch.where(hi < lo, 0.0, ("),
    "constant channel by tolerance": ("torch.where(hi == lo,", "torch.where(hi - lo < 1e-4,"),
    "scale and shift instead of a difference": (
        "(tiles[:, :, :-1] - lo) / (hi - lo)",
        "tiles[:, :, :-1] * (1 / (hi - lo)) - lo * (1 / (hi - lo))",
    ),
    "reciprocal overflows for denormal bounds": ("- lo) / (hi - lo)", "- lo) * (1 / (hi - lo))"),
    "one channel has no deviation": ("if y.shape[-1] == 1:", "if y.shape[-1] == -1:"),
    "value's weight ignored": ("value_weight * one(", "one("),
    "keys alone": (" + value_weight * one(_partitions(value, start, lag_size))", ""),
    "arithmetic in the storage type": (".to(formulas.arithmetic_dtype(x.dtype))", ""),
    "scores rounded to bfloat16": (
        "return torch.softmax(y.std(dim=-1), dim=-1)",
        "return torch.softmax(y.std(dim=-1), dim=-1).bfloat16().to(y.dtype)",
    ),
    "float32 scores of float64 inputs": (
        "return torch.softmax(y.std(dim=-1), dim=-1)",
        "return torch.softmax(y.float().std(dim=-1), dim=-1).to(y.dtype)",
    ),
    "cosine: kept are the closest": ("return -(direction", "return (direction"),
    "cosine: anchor of the own partition": ("direction[:, :, 1:].mean", "direction[:, :, :-1].mean"),
    "cosine: anchor of raw rows": ("direction[:, :, 1:].mean", "tiles[:, :, 1:].mean"),
    "cosine: not standardised": (
        "return _divide_or_zero(s - s.mean(dim=-1, keepdim=True), ",
        "return _divide_or_zero(s * 0 + s, 0 * s[..., :1] + 1 + 0 * ",
    ),
    "cosine: biased deviation": (
        "s.std(dim=-1, keepdim=True))",
        "s.std(dim=-1, keepdim=True, correction=0))",
    ),
    "cosine: one token has no deviation": ("if s.shape[-1] == 1:", "if s.shape[-1] == -1:"),
    "cosine: norm 0 divides": ("torch.where(divisor == 0, 0.0,", "torch.where(divisor < 0, 0.0,"),
    "bounds: minimum twice": ("tiles.amax(dim=3)], dim=3)", "tiles.amin(dim=3)], dim=3)"),
    "bounds: NaN ignored": ("torch.stack([tiles.amin", "torch.stack([tiles.nan_to_num(0).amin"),
    "in place: a row is missing": (
        "key[:, :, : index.shape[2]] = new_key",
        "key[:, :, : index.shape[2] - 1] = new_key[:, :, :-1]",
    ),
    "in place: value from key's rows": (
        "value[:, :, : index.shape[2]] = new_value",
        "value[:, :, : index.shape[2] - 1] = new_value[:, :, 1:]",
    ),
}


def mutant(old: str, new: str) -> Backend:
    source = inspect.getsource(reference)
    assert old in source, f"reference.py has no {old!r} any more: bring this list up to date"
    module = types.ModuleType("mutant")
    exec(compile(source.replace(old, new), "mutant of reference.py", "exec"), module.__dict__)
    return Backend("reference", module)


def find_fault(backend: Backend) -> None:
    """Run the properties until one fails, and raise what it raises."""

    @settings(
        max_examples=30,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(expanded=False))
    def run(case: Case) -> None:
        for check in CASE_CHECKS:
            check(backend, case)

    scores = torch.tensor([[0.0, 1.0, -0.0, 1.0, torch.nan, 0.5, 1.0]])
    for keep in range(1, 8):
        check_topk_index(backend, scores, keep)
    for case in TRAPS.values():
        for check in CASE_CHECKS:
            check(backend, case)
    run()


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault):
    with pytest.raises(AssertionError):
        find_fault(mutant(*FAULTS[fault]))


class Careless:
    """The reference, wrapped: each method below spoils memory in its own way."""

    def __getattr__(self, name):
        return getattr(reference, name)


class WritesPastTheRow(Careless):
    def compress_(self, key, value, *arguments, **scoring):
        index = reference.compress_(key, value, *arguments, **scoring)
        if key.numel():
            wider = key.as_strided((*key.shape[:3], key.shape[3] + 1), key.stride())
            wider[:, :, :1] = 7.0
            key.copy_(reference_rows(key, wider))
        return index


def reference_rows(key, wider):
    return wider[..., : key.shape[3]]


class WritesBeforeTheTensor(Careless):
    def compress_(self, key, value, *arguments, **scoring):
        key.as_strided((1,), (1,), key.storage_offset() - 1).fill_(0.0)
        return reference.compress_(key, value, *arguments, **scoring)


class WritesItsInput(Careless):
    def compress(self, key, value, *arguments, **scoring):
        result = reference.compress(key, value, *arguments, **scoring)
        value[:, :, -1:] = 0.0
        return result


class LeavesARowUnwritten(Careless):
    def compress(self, key, value, *arguments, **scoring):
        new_key, *rest = reference.compress(key, value, *arguments, **scoring)
        poisoned = torch.empty_like(new_key)
        poisoned[:, :, :-1] = new_key[:, :, :-1]
        return poisoned, *rest


class LosesTheSignOfZero(Careless):
    def compact(self, x, index):
        return reference.compact(x, index) + 0.0

    def compress(self, key, value, *arguments, **scoring):
        new_key, new_value, index = reference.compress(key, value, *arguments, **scoring)
        return new_key + 0.0, new_value + 0.0, index


class LosesNaNPayloads(Careless):
    def compress(self, key, value, *arguments, **scoring):
        new_key, new_value, index = reference.compress(key, value, *arguments, **scoring)
        return new_key.nan_to_num(torch.nan, torch.inf, -torch.inf), new_value, index


class ReadsAcrossThePadding(Careless):
    """Takes every input for contiguous."""

    def lag_score(self, key, value, *arguments, **scoring):
        dense = [x.as_strided(x.shape, torch.empty(x.shape).stride()) for x in (key, value)]
        return reference.lag_score(*dense, *arguments, **scoring)


@pytest.mark.parametrize("kind", Careless.__subclasses__(), ids=lambda kind: kind.__name__)
def test_careless_memory_is_found(kind):
    with pytest.raises(AssertionError):
        find_fault(Backend("reference", kind()))


def test_dependence_on_threads_is_found():
    class Splits(Careless):
        def lag_score(self, key, value, *arguments, **scoring):
            return reference.lag_score(key, value, *arguments, **scoring) + torch.get_num_threads() * 1e-7

    with pytest.raises(AssertionError, match="threads"):
        check_repeatable(Backend("simt", Splits()), TRAPS["plain"])


def test_unbounded_index_is_found():
    class Modulo(Careless):
        def compact(self, x, index):
            return reference.compact(x, (index + 1) % x.shape[2])

    placed = TRAPS["plain"].make()[0]
    with pytest.raises(AssertionError):
        check_compact(
            Backend("reference", Modulo()), placed, torch.arange(5, dtype=torch.int32).expand(1, 2, -1)
        )


def test_the_band_decides():
    """The tolerance is no excuse: on ordinary values nearly every token is surely kept or surely not."""
    from tests.ops.properties import band_of

    for kind in FINITE_KINDS:
        if kind in ("ties", "zeros"):
            continue
        for score in ("std", "cosine"):
            case = Case(1, 2, 16 + 5 * 64, 32, 32, 16, 64, 16, torch.float32, kind, kind, score=score)
            band = band_of(case)
            if kind in ("denormal", "vast") and score == "cosine":
                assert band.tolerance.isinf().all()  # float32 cannot hold the squares
                continue
            if kind == "constant_denormal" and score == "cosine":
                continue  # all rows have the direction of the constant channels
            cut = band.exact.sort(dim=-1, descending=True).values[..., 15:17].mean(-1, keepdim=True)
            undecided = (band.lower < cut) & (band.upper > cut)
            assert undecided.double().mean() < 0.1, (kind, score)


def test_layouts_cover_what_they_say():
    layout = Layout(order=(0, 2, 1), row_pad=3, spare=(1, 1, 1), offset=1)
    key, _ = Case(batch=2, heads=3, length=4, key_dim=5, value_dim=5, key_layout=layout).make()
    assert key.view.stride() == (5 * 4 * 8, 8, 4 * 8, 1)
    assert key.view.data_ptr() % 16 != 0
    assert key.outside().sum() == key.storage.numel() - key.view.numel()
    assert key.storage[key.outside()].isnan().all()
