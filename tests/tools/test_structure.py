"""Dependencies point one way: between the rooms of the package, and from launchers to device code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lagkv_ext

PACKAGE = Path(lagkv_ext.__file__).resolve().parent
CSRC = PACKAGE.parent / "csrc"
LIBRARY = "library"
#: Rooms that a room may import. The library is what lies directly in the package: operators, reference, settings files.
MAY_IMPORT = {
    LIBRARY: {LIBRARY},
    "cache": {LIBRARY, "cache"},
    "serving": {LIBRARY, "cache", "serving"},
    "vllm": {LIBRARY, "serving", "vllm"},
    "commands": {LIBRARY, "cache", "serving", "commands"},
}
# `import lagkv_ext` offers the caches by name and imports them at their first use.
LAZY = {("__init__.py", "lagkv_ext.cache")}


def room_of_file(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else LIBRARY


def room_of_module(module: str) -> str:
    second = module.split(".")[1] if "." in module else ""
    return second if (PACKAGE / second / "__init__.py").exists() and second else LIBRARY


def imported_modules(path: Path) -> set[str]:
    """Full names of what a file imports of this package, functions and type checking included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            # `from lagkv_ext import cache` names a module, `from lagkv_ext import compress` a function.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name == "lagkv_ext" or name.startswith("lagkv_ext.")}


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_a_rule():
    rooms = {room_of_file(path) for path in FILES}
    assert rooms == set(MAY_IMPORT)
    assert {"cache", "serving", "vllm", "commands"} <= rooms  # not an empty walk


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    allowed = MAY_IMPORT[room_of_file(path)]
    for module in imported_modules(path):
        if any(path.name == name and module.startswith(lazy) for name, lazy in LAZY):
            continue
        assert room_of_module(module) in allowed, f"{path.relative_to(PACKAGE)} imports {module}"


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#include [<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.skipif(not CSRC.exists(), reason="no sources here: tests run outside a checkout")
def test_device_code_knows_neither_torch_nor_the_host_runtime():
    headers = sorted(CSRC.glob("cuda/*.cuh"))
    assert headers
    for path in headers:
        for name in includes(path):
            assert not name.startswith(("torch/", "ATen/", "c10/")), f"{path.name} includes {name}"
            assert name != "cuda_runtime.h", f"{path.name} includes {name}"


@pytest.mark.skipif(not CSRC.exists(), reason="no sources here: tests run outside a checkout")
def test_neither_backend_includes_the_other():
    for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
        files = [path for path in (CSRC / here).rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
        assert files
        for path in files:
            assert not any(there in name.split("/") for name in includes(path)), path
