"""Hypothesis profiles, and the backends as fixtures.

``pytest -m gpu`` runs exactly the tests that need a card, ``-m "not gpu"`` all others. ``--backend NAME`` (repeatable)
limits the operator tests to some backends; ``--require-backend NAME`` turns the skip of a backend into a failure.
``--only-gpu-skips`` fails where a test is skipped for another reason than a missing card
(or a present one, for tests marked ``no_gpu``), such as a package or a program that CI must have.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.ops import backends

_COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=12, **_COMMON)
settings.register_profile("ci", max_examples=60, derandomize=True, database=None, **_COMMON)
settings.register_profile("thorough", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_configure(config: pytest.Config) -> None:
    # The reference asks for the deviation over no tokens where nothing is compressed; the result is empty.
    config.addinivalue_line("filterwarnings", r"ignore:.*degrees of freedom is <= 0.*:UserWarning")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lagkv")
    names = list(backends.FACTORIES)
    group.addoption(
        "--backend", action="append", choices=names, help="run operator tests on these backends only"
    )
    group.addoption(
        "--require-backend",
        action="append",
        choices=names,
        default=[],
        help="fail where this backend cannot run",
    )
    group.addoption(
        "--only-gpu-skips",
        action="store_true",
        help="fail where a test is skipped for another reason than a missing GPU",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    skipped = report.skipped and not hasattr(report, "wasxfail")
    allowed = item.get_closest_marker("no_gpu" if torch.cuda.is_available() else "gpu") is not None
    if skipped and not allowed and item.config.getoption("--only-gpu-skips"):
        _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that is skipped as a whole hides tests that no marker speaks of."""
    report = yield
    if report.skipped and collector.config.getoption("--only-gpu-skips"):
        _fail(report)
    return report


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid} must not be skipped (--only-gpu-skips): {reason}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    families = {
        "backend": tuple(backends.FACTORIES),
        "kernel_backend": backends.KERNELS,
        "registered_backend": backends.REGISTERED,
    }
    wanted = metafunc.config.getoption("--backend")
    for fixture, names in families.items():
        if fixture in metafunc.fixturenames:
            chosen = [
                pytest.param(name, marks=[pytest.mark.gpu] if name == "cuda" else [])
                for name in names
                if not wanted or name in wanted
            ]
            metafunc.parametrize(fixture, chosen, indirect=True, scope="session")


def _make(request: pytest.FixtureRequest) -> backends.Backend:
    try:
        return backends.FACTORIES[request.param]()
    except backends.Unavailable as reason:
        if request.param in request.config.getoption("--require-backend"):
            pytest.fail(f"backend {request.param} is required and cannot run: {reason}")
        pytest.skip(f"backend {request.param}: {reason}")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> backends.Backend:
    """Every backend, the reference included."""
    return _make(request)


@pytest.fixture(scope="session")
def kernel_backend(request: pytest.FixtureRequest) -> backends.Backend:
    """Every backend but the reference."""
    return _make(request)


@pytest.fixture(scope="session")
def registered_backend(request: pytest.FixtureRequest) -> backends.Backend:
    """Every backend that torch's dispatcher reaches."""
    return _make(request)


@pytest.fixture(scope="session")
def executor() -> backends.Backend:
    """The CUDA kernels in the executor, for what no other backend has."""
    try:
        return backends.make_simt()
    except backends.Unavailable as reason:
        pytest.skip(f"backend simt: {reason}")
