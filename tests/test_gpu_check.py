"""``make gpu-check`` has to work on a machine that has torch, pytest, hypothesis, ninja and pybind11, and no more."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

TESTS = Path(__file__).parent
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
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "test_gpu.py::test_launches_on_the_current_stream" in done.stdout
