"""``make gpu-check`` has to work on a machine that has torch, pytest, hypothesis, ninja and pybind11, and no more."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "gpu_check.py"
# Imported by tests and by what they test; torch does not bring them.
OPTIONAL = (
    "accelerate",
    "gguf",
    "kvpress",
    "matplotlib",
    "numpy",
    "prometheus_client",
    "rich",
    "safetensors",
    "tokenizers",
    "transformers",
    "typer",
    "yaml",
)


def test_every_test_file_is_collected_without_the_optional_packages():
    """pytest runs no test at all where one file cannot be imported: the tests that need a card included."""
    code = f"""
        import sys
        from importlib.machinery import PathFinder

        class WithoutOptional(PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                if name.split(".")[0] in {OPTIONAL!r}:
                    return None
                return super().find_spec(name, path, target)

        sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutOptional
        import pytest
        sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]))
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "test_gpu.py::test_launches_on_the_current_stream" in done.stdout


def test_no_step_passes_by_skipping_its_tests(tmp_path):
    if not TOOL.exists():
        pytest.skip("no tools here: tests run outside a checkout")
    spec = importlib.util.spec_from_file_location("gpu_check", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    steps = tool.checks(tmp_path, (9, 0), "compute-sanitizer", 1)
    commands = {step.name: " ".join(step.command) for step in steps if "pytest" in step.command}
    assert len(commands) == 1 + len(tool.SANITIZER_TOOLS)
    for name, command in commands.items():
        assert "--require-backend cuda" in command, name
