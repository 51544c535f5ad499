"""``import lagkv_ext`` needs torch alone, and says what is wrong when it cannot work."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import lagkv_ext

ROOT = Path(lagkv_ext.__file__).resolve().parent.parent


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_import_needs_torch_alone():
    """Whatever torch itself does not bring is refused during the import."""
    done = run(
        """
        import sys
        import torch
        before = set(sys.modules)
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] not in ("lagkv_ext", "torch", *sys.stdlib_module_names):
                    raise ImportError(f"lagkv_ext imported {name}")
        sys.meta_path.insert(0, Refuse())
        import lagkv_ext
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        print(sorted(new - set(sys.stdlib_module_names) - {"torch", "lagkv_ext"}))
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_public_names_are_there():
    for name in lagkv_ext.__all__:
        if not name.endswith("Cache"):  # these need transformers: tested with the caches
            assert getattr(lagkv_ext, name) is not None


def test_a_second_copy_is_refused_by_name():
    done = run(
        """
        import sys
        import lagkv_ext
        for name in [name for name in sys.modules if name.split(".")[0] == "lagkv_ext"]:
            del sys.modules[name]
        import lagkv_ext
        """
    )
    assert done.returncode == 1
    assert "ImportError: the lagkv operators are already registered in this process" in done.stderr


def test_a_library_older_than_its_python_is_said(tmp_path):
    """The Python of a later version, which knows one more operator, beside today's library."""
    copy = tmp_path / "lagkv_ext"
    shutil.copytree(ROOT / "lagkv_ext", copy, ignore=shutil.ignore_patterns("__pycache__", "_cuda.*", "data"))
    source = copy / "_library.py"
    text = source.read_text(encoding="utf-8")
    assert '    "compress_paged_",\n' in text
    source.write_text(text.replace('"compress_paged_",', '"compress_paged_", "sort_",'), encoding="utf-8")
    done = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lagkv_ext")
    assert done.returncode == 1
    assert (
        f"ImportError: {copy / '_C.abi3.so'} is older than the Python beside it: it has no sort_."
        in done.stderr
    )
    assert "make build" in done.stderr


def test_info_reports_what_runs():
    done = subprocess.run(
        [sys.executable, "-m", "lagkv_ext", "info"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    facts = lagkv_ext.info()
    assert f"cpu_isa: {facts['cpu_isa']}" in done.stdout
    assert facts["cpu_isa"] in ("portable", "avx2", "avx512")
    assert "cuda" in facts["build"]
