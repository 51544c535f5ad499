"""Models and the environment of vLLM. Tests that need vLLM run in `make test-vllm` and are not collected elsewhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.vllm import engine

HAS_VLLM = importlib.util.find_spec("vllm") is not None
WITHOUT_VLLM = {"test_check.py", "test_metrics.py", "test_plan.py", "test_settings.py"}
FILES = {path.name for path in Path(__file__).parent.glob("test_*.py")}
collect_ignore = [] if HAS_VLLM else sorted(FILES - WITHOUT_VLLM)
if HAS_VLLM:
    engine.prepare()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def llama(folder: Path) -> Path:
    from tests.vllm import models

    return models.save("llama", folder)


@pytest.fixture(scope="session")
def gemma3(folder: Path) -> Path:
    from tests.vllm import models

    return models.save("gemma3", folder)
