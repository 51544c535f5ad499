"""The cases that wrong kernels are known to trip over: every backend runs all of them, every time."""

from __future__ import annotations

import pytest

from tests.ops import properties
from tests.ops.cases import TRAPS


@pytest.mark.parametrize("trap", TRAPS)
def test_trap(backend, trap):
    for check in properties.CASE_CHECKS:
        check(backend, TRAPS[trap])
