"""C++ programs: the example builds and runs, every function of lagkv/operators.h gives the bits that Python gets, and
the libraries that CMake builds are compiled as those of setup.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lagkv_ext
from tests.simt.build import Unavailable, tool

ROOT = Path(lagkv_ext.__file__).resolve().parent.parent
HEADER = Path(lagkv_ext.cmake_prefix_path).parent / "include/lagkv/operators.h"


def why_not() -> str:
    """Names what is missing to build a program; empty where nothing is."""
    try:
        tool("cmake"), tool("c++")
    except Unavailable as error:
        return str(error)
    return ""


needs_compiler = pytest.mark.skipif(bool(why_not()), reason=why_not())


def configure(source: Path, folder: Path, *options: str) -> None:
    run(tool("cmake"), "-S", source, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}", *options)


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ROUTES = {
    "package": (f"-DCMAKE_PREFIX_PATH={lagkv_ext.cmake_prefix_path}",),
    "sources": (f"-DLAGKV_SOURCES={ROOT}", "-DLAGKV_BUILD_CUDA=OFF"),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory, request) -> Path:
    """The folder of ``operators``, linked with lagkv::lagkv as a route of `ROUTES` gives it, and ``unlinked``."""
    folder = tmp_path_factory.mktemp("cpp")
    configure(ROOT / "tests/ops/cpp", folder, *ROUTES[request.param])
    run(tool("cmake"), "--build", folder)
    return folder


def numbers(*shape: int, step: float) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.float32).mul(step).remainder(1.0).reshape(shape)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def expected() -> list[torch.Tensor]:
    """Output of tests/ops/cpp/operators.cpp."""
    ops = torch.ops.lagkv
    key, value = numbers(2, 3, 70, 16, step=0.37), numbers(2, 3, 70, 24, step=0.71)
    out = []
    for score in ("std", "cosine"):
        options = {"value_weight": 0.5, "score": score}
        out += [*ops.compress(key, value, 4, 16, 5, **options), ops.lag_score(key, value, 4, 16, **options)]
    best = ops.topk_index(ops.lag_score(key, value, 4, 16), 3)
    out += [ops.partition_bounds(key, 4, 16), best, ops.compact(key, best[:, :, 0].contiguous())]
    k, v = key.clone(), value.clone()
    out += [ops.compress_(k, v, 4, 16, 5), k, v]
    k, v, start, length = key.clone(), value.clone(), int32(4, 0), int32(70, 50)
    out += [ops.compress_ragged_(k, v, start, length, 16, 5), k, v, start, length]
    k, v = numbers(70, 3, 16, step=0.37), numbers(70, 3, 24, step=0.71)
    k, v, index, cu_seqlens, start = ops.compress_varlen(k, v, int32(0, 70), int32(4), 16, 5)
    valid = int(cu_seqlens[-1])
    out += [k[:valid], v[:valid], index, cu_seqlens, start]
    k, v = numbers(5, 16, 3, 16, step=0.37), numbers(5, 16, 3, 24, step=0.71)
    table, start, length = int32(3, 1, 4, 0, 2).reshape(1, 5), int32(4), int32(70)
    out += [ops.compress_paged_(k, v, table, start, length, 16, 5), k, v, start, length]
    options = {"score": "blend", "smooth": 3}
    out += [
        ops.lag_score(key, value, 4, 16, **options),
        *ops.compress(key, value, 4, 16, 5, **options, budget="head"),
        *ops.compress_carried(key, value, numbers(2, 3, 2, step=0.3), 6, 16, 5, **options),
    ]
    k, v, scores = key.clone(), value.clone(), numbers(2, 3, 70, step=0.3)
    out += [ops.compress_(k, v, 6, 16, 5, **options, budget="head", scores=scores, sink_size=4), scores]
    k, v = numbers(9, 16, 3, 16, step=0.37), numbers(9, 16, 3, 24, step=0.71)
    tables = table, int32(5, 7, 8)[None], int32(0), int32(1)
    return [*out, ops.compress_blocks(k, v, *tables, 4, 32, 16, **options), k, v]


@needs_compiler
@pytest.mark.parametrize("programs", ROUTES, indirect=True)
def test_every_operator_gives_the_bits_of_python(programs, tmp_path):
    run(programs / "operators", tmp_path / "out")
    written = (tmp_path / "out").read_bytes()
    for number, tensor in enumerate(expected()):
        count = tensor.nbytes
        got = torch.frombuffer(bytearray(written[:count]), dtype=tensor.dtype).reshape(tensor.shape)
        assert torch.equal(got, tensor), f"tensor {number} of tests/ops/cpp/operators.cpp"
        written = written[count:]
    assert not written


@needs_compiler
@pytest.mark.parametrize("programs", ["package"], indirect=True)
def test_errors_name_the_argument_and_the_missing_library(programs):
    refused = subprocess.run([programs / "operators"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert "lagkv::compress: keep must be at most lag_size (2), got 3" in refused.stderr
    unlinked = subprocess.run([programs / "unlinked"], capture_output=True, text=True, timeout=60)
    assert unlinked.returncode == 1
    assert "lagkv::compress is not registered: link lagkv::lagkv" in unlinked.stderr


@needs_compiler
def test_the_example(tmp_path):
    configure(ROOT / "examples/cpp", tmp_path, *ROUTES["package"])
    run(tool("cmake"), "--build", tmp_path)
    assert run(tmp_path / "compress") == "of 4096 tokens 1216 stay, the last of them 4095\n"


def test_the_header_has_every_operator_with_its_arguments():
    """Names, order and defaults are those of the schemas."""
    text = re.sub(r"\s+", " ", HEADER.read_text(encoding="utf-8"))
    declared = dict(re.findall(r"inline \S.*? (\w+)\( ?([^)]*)\) \{", text))
    schemas = {
        name.removeprefix("lagkv::"): getattr(torch.ops.lagkv, name.removeprefix("lagkv::")).default._schema
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("lagkv::") and not name.startswith("lagkv::_")
    }
    assert set(declared) == set(schemas)
    defaults = {
        "value_weight": "double value_weight = 1.0",
        "score": 'std::string_view score = "std"',
        "smooth": "int64_t smooth = 1",
        "budget": 'std::string_view budget = "partition"',
        "scores": "const std::optional<at::Tensor>& scores = std::nullopt",
        "sink_size": "int64_t sink_size = 0",
    }
    for name, schema in schemas.items():
        wanted = [
            defaults[x.name]
            if x.has_default_value()
            else f"const at::Tensor& {x.name}"
            if str(x.type) == "Tensor"
            else f"int64_t {x.name}"
            for x in schema.arguments
        ]
        assert declared[name].split(", ") == wanted, name
        assert f'"{schema.name}"' in text


@needs_compiler
def test_cmake_compiles_as_setup_py_does(tmp_path):
    """Contracted products and sums, say, would make scores differ between two builds of one source."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    flags = {
        x
        for line in re.findall(r"^(?:STABLE_ABI|CXX_FLAGS) = \[(.*)\]", text, re.M)
        for x in re.findall(r'"(.+?)"', line)
    }
    assert "-ffp-contract=off" in flags
    flags -= {"-DPy_LIMITED_API=0x030A0000"}  # a library of CMake's knows no Python
    configure(ROOT, tmp_path, "-DLAGKV_BUILD_CUDA=OFF")
    commands = json.loads((tmp_path / "compile_commands.json").read_text(encoding="utf-8"))
    assert {Path(x["file"]) for x in commands} == {
        ROOT / "csrc/schemas.cpp",
        *(ROOT / "csrc/cpu").rglob("*.cpp"),
    }
    for command in commands:
        given = command["command"].split()
        assert flags <= set(given), f"{command['file']}: {flags - set(given)}"
