"""``make wheel`` checks what it built: a wheel with a wrong tag, a file too many or a leaked library is caught."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "tools" / "wheels.py").exists() or not (ROOT / ".git").exists():
    pytest.skip("no checkout here: wheels hold what git lists", allow_module_level=True)
sys.path.insert(0, str(ROOT))  # tools is a package of the checkout, not of the installation

from tools import wheels  # noqa: E402

NAME = "lagkv_ext-1.0-cp310-abi3-linux_x86_64.whl"
METADATA = "lagkv_ext-1.0.dist-info/WHEEL"


def library(folder: Path, name: str, *options: str) -> bytes:
    source = folder / "empty.cpp"
    source.write_text("void nothing() {}\n")
    command = [
        "c++",
        "-shared",
        "-fPIC",
        "-Wl,--no-as-needed",
        "-o",
        str(folder / name),
        str(source),
        *options,
    ]
    subprocess.run(command, check=True)
    return (folder / name).read_bytes()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """A CPU wheel without a fault, by file."""
    folder = tmp_path_factory.mktemp("library")
    found = dict.fromkeys(wheels.expected_files("cpu"), b"")
    found["lagkv_ext/_C.abi3.so"] = library(folder, "_C.abi3.so")
    found[wheels.GENERATED] = json.dumps({"cuda": {"built": False}}).encode()
    found[METADATA] = b"Root-Is-Purelib: false\nTag: cp310-abi3-linux_x86_64\n"
    return found


def judge(folder: Path, files: dict[str, bytes], name: str = NAME) -> list[str]:
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return wheels.faults(folder / name, "cpu")


def test_a_wheel_without_fault(tmp_path, files):
    assert judge(tmp_path, files) == []


def test_a_wheel_for_one_python_alone(tmp_path, files):
    name = NAME.replace("cp310-abi3", "cp311-cp311")
    tagged = {**files, METADATA: files[METADATA].replace(b"cp310-abi3", b"cp311-cp311")}
    assert judge(tmp_path, tagged, name) == [
        "tag cp311-cp311-linux_x86_64: cp310-abi3 for Linux was expected",
    ]
    (fault,) = judge(tmp_path, files, NAME.replace("linux", "manylinux_2_28"))
    assert fault.startswith("the file's name says cp310-abi3-manylinux_2_28_x86_64, its metadata")
    (fault,) = judge(tmp_path, {**files, METADATA: files[METADATA].replace(b"false", b"true")})
    assert fault.startswith("Root-Is-Purelib")


def test_a_file_too_many_or_too_few(tmp_path, files):
    stale = {**files, "lagkv_ext/_cuda.abi3.so": files["lagkv_ext/_C.abi3.so"]}
    with zipfile.ZipFile(tmp_path / "stale.zip", "w") as archive:
        for path, content in stale.items():
            archive.writestr(path, content)
        assert wheels.faults_of_contents(archive, "cpu") == [
            "lagkv_ext/_cuda.abi3.so does not belong into the cpu wheel"
        ]
        cuda = wheels.faults_of_contents(archive, "cuda")
    assert cuda == [f"{wheels.GENERATED} says cuda.built = False"]
    assert judge(tmp_path, {**files, "tests/conftest.py": b""}) == [
        "tests/conftest.py does not belong into the cpu wheel"
    ]
    bundled = {**files, "lagkv_ext.libs/libgomp.so.1": files["lagkv_ext/_C.abi3.so"]}
    assert "lagkv_ext.libs/libgomp.so.1 does not belong into the cpu wheel" in judge(tmp_path, bundled)
    less = {name: content for name, content in files.items() if name != "lagkv_ext/py.typed"}
    assert judge(tmp_path, less) == ["lagkv_ext/py.typed is missing"]


def test_a_leaked_library(tmp_path, files):
    library(tmp_path, "libelsewhere.so", "-Wl,-soname,libelsewhere.so.3")
    leaking = library(tmp_path, "_C.abi3.so", f"-L{tmp_path}", "-lelsewhere")
    assert judge(tmp_path, {**files, "lagkv_ext/_C.abi3.so": leaking}) == [
        "_C.abi3.so needs libelsewhere.so.3"
    ]
    rooted = library(tmp_path, "_C.abi3.so", "-Wl,-rpath,/build/torch/lib")
    (fault,) = judge(tmp_path, {**files, "lagkv_ext/_C.abi3.so": rooted})
    assert fault.startswith("_C.abi3.so has ")
    assert fault.endswith("/build/torch/lib")


def test_cuda_libraries_are_for_the_cuda_library_alone(tmp_path):
    library(tmp_path, "libcudart.so", "-Wl,-soname,libcudart.so.13")
    for name, expected in (("_cuda.abi3.so", []), ("_C.abi3.so", ["_C.abi3.so needs libcudart.so.13"])):
        library(tmp_path, name, f"-L{tmp_path}", "-lcudart")
        assert wheels.faults_of_library(tmp_path / name) == expected


def test_code_of_every_source_for_every_architecture():
    """As cuobjdump lists it; setup.py has the architectures."""
    names = [x.replace(".", "").removesuffix("+PTX") for x in wheels.architectures()]
    assert len(names) == 6
    sources = [path.stem for path in (ROOT / "csrc/cuda").rglob("*.cu")]
    elf = [f"ELF file    1: {source}.sm_{name}.cubin" for source in sources for name in names]
    ptx = [f"PTX file    1: {source}.sm_{names[-1]}.ptx" for source in sources]
    assert wheels.faults_of_code("\n".join(elf), "\n".join(ptx)) == []
    assert wheels.faults_of_code("\n".join(elf[1:]), "\n".join(ptx)) == [
        f"no {sources[0]}.sm_{names[0]}.cubin in it"
    ]
    assert wheels.faults_of_code("\n".join(elf), "") == sorted(
        f"no {source}.sm_{names[-1]}.ptx in it" for source in sources
    )
    more = wheels.faults_of_code("\n".join([*elf, "ELF file    9: ops.sm_75.cubin"]), "\n".join(ptx))
    assert more == ["ops.sm_75.cubin is in it, and setup.py does not name it"]
