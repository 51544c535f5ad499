"""The properties of the options find faults: the reference with one fault planted fails at least one of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lagkv_ext import reference
from tests.ops import option_properties, properties, ragged_properties
from tests.ops.backends import Backend
from tests.ops.cases import TRAPS
from tests.ops.test_mutants import mutant
from tests.ops.test_ragged_properties import TRAPS as RAGGED_TRAPS

# Name of the fault: text of reference.py, and what replaces it.
FAULTS = {
    "blend: the paper's part without its scale": ("+ tiles.shape[3] * _std_score", "+ _std_score"),
    "blend: twice the scale": ("+ tiles.shape[3] * _std_score", "+ 2 * tiles.shape[3] * _std_score"),
    "blend: kept are the closest": (
        "return _minus_cosine(tiles) + tiles",
        "return -_minus_cosine(tiles) + tiles",
    ),
    "blend: standardised": ("return _minus_cosine(tiles) + tiles", "return _cosine_score(tiles) + tiles"),
    "smooth: one token too far": ("half = min(smooth // 2, ", "half = min(smooth // 2 + 1, "),
    "smooth: edges count as many tokens": ("return total / count", "return total / (2 * half + 1)"),
    "smooth: the token itself is left out": (
        "for offset in range(-half, half + 1):",
        "for offset in (o for o in range(-half, half + 1) if o):",
    ),
    "smooth: key alone": ("return smoothed(total, smooth)", "return total"),
    "head: the first rows and not the best": (
        "chosen = topk_index(rivals, ",
        "chosen = topk_index(rivals * 0, ",
    ),
    "head: earlier rows are kept for sure": (
        "rivals = torch.cat([carried, score.flatten(2)], dim=2)",
        "rivals = torch.cat([carried * 0 + 1e9, score.flatten(2)], dim=2)",
    ),
    "head: positions without the sink": ("chosen + sink, position", "chosen, position"),
    "head: the next scores are the first": (
        "return index, rivals.gather(2, chosen.long())",
        "return index, rivals[:, :, : chosen.shape[2]]",
    ),
    "in place: scores are not written": (
        "scores[:, :, sink_size : sink_size + carried.shape[2]] = carried",
        "pass",
    ),
    "in place: scores from the first row on": (
        "scores[:, :, sink_size : sink_size + carried.shape[2]] = carried",
        "scores[:, :, : carried.shape[2]] = carried",
    ),
    "slots: scores of the first sequence": ("scores[b : b + 1, :, sink:first]", "scores[:1, :, sink:first]"),
    "slots: scores are not written": ("scores[b, :, sink:new_start] = carried[0]", "pass"),
    "pages: scores are not written": ("scores[block[moved], row[moved]] = carried[0].T", "pass"),
    "pages: rows before start do not move": (
        "position[(first if scores is None else sink) : rows]",
        "position[first:rows]",
    ),
}  # fmt: skip
METHODS = (
    {"score": "blend", "smooth": 3, "budget": "head"},
    {"score": "blend", "budget": "head"},
    {"smooth": 5},
)
DENSE = ("plain", "odd", "one-token", "nan", "offset-float32")
RAGGED = ("plain", "shared-pages", "one-long", "keep-all")


def find_fault(backend: Backend) -> None:
    for method in METHODS:
        for name in DENSE:
            case = dataclasses.replace(TRAPS[name], **method)
            for check in (properties.check_lag_score, properties.check_staged, properties.check_in_place):
                check(backend, case)
            for earlier in (0, case.start):
                option_properties.check_carried(backend, case, earlier)
                option_properties.check_carried_in_place(backend, case, earlier)
        for name in RAGGED:
            ragged = dataclasses.replace(RAGGED_TRAPS[name], dtype=torch.float32, **method)
            for check in ragged_properties.CHECKS:
                check(backend, ragged)
            option_properties.check_scored_slots(backend, ragged, 2)
            option_properties.check_scored_pages(backend, dataclasses.replace(ragged, shared=False), 2)


def test_the_reference_has_none():
    find_fault(Backend("reference", reference))


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault):
    with pytest.raises(AssertionError):
        find_fault(mutant(*FAULTS[fault]))
