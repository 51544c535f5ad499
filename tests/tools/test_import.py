"""``import lagkv_ext`` needs torch alone, and says what is wrong when it cannot work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

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


def test_a_torch_with_another_cuda_is_refused_by_name(tmp_path):
    """A wheel built with CUDA 13 beside a torch with CUDA 12: no program waits for a symbol that is not there."""
    copy = tmp_path / "lagkv_ext"
    shutil.copytree(ROOT / "lagkv_ext", copy, ignore=shutil.ignore_patterns("__pycache__", "_cuda.*", "data"))
    info = json.loads((copy / "_build_info.json").read_text(encoding="utf-8"))
    info["cuda"] = {"built": True, "reason": "", "nvcc": "13.0", "architectures": ["9.0"]}
    (copy / "_build_info.json").write_text(json.dumps(info), encoding="utf-8")
    done = run(
        f"""
        import sys, torch
        torch.version.cuda = "12.8"
        sys.path.insert(0, {str(tmp_path)!r})
        import lagkv_ext
        """
    )
    assert done.returncode == 1
    assert (
        f"ImportError: {copy} was built with CUDA 13.0, torch {torch.__version__} has CUDA 12.8."
        in done.stderr
    )
    assert "a wheel of lagkv_ext without CUDA" in done.stderr


def test_info_reports_what_runs():
    done = subprocess.run(
        [sys.executable, "-m", "lagkv_ext", "info"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    facts = lagkv_ext.info()
    assert f"cpu_isa: {facts['cpu_isa']}" in done.stdout
    assert facts["cpu_isa"] in ("portable", "avx2", "avx512")
    assert "cuda" in facts["build"]
