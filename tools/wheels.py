"""Builds the CUDA wheel and the CPU wheel, checks them, and runs both with several releases of torch.

``python -m tools.wheels [--only cuda|cpu] [--torch 2.10.0 2.13.0 2.14.1] [--skip-build]``: wheels come to dist/cuda and
dist/cpu, sizes and times to dist/wheels.json. Each is built from a copy of the files that git lists, because a checkout
may hold libraries of another build. Then per release of torch a fresh environment, and in it each wheel: installation,
``python -m lagkv_ext info``, operators against the reference, removal. Ends with status 1 where a check fails.
Needs git, objdump, nvcc, and a package index.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("cuda", "cpu")
TORCH = ("2.10.0", "2.13.0", "2.14.1")
GENERATED = "lagkv_ext/_build_info.json"
# Of torch, of CUDA's runtime (which a CUDA torch brings), of the C and C++ runtimes (which every Linux has).
EXTERNAL = {
    "cpu": r"lib(c10|torch_cpu|torch|stdc\+\+|gcc_s|m|c|pthread|dl)\.so[.\d]*|ld-linux-x86-64\.so\.2",
    "cuda": r"lib(c10_cuda|torch_cuda|cudart)\.so[.\d]*",
}


def run(command: list[str], **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        raise SystemExit(f"wheels: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def tracked_files() -> list[str]:
    """Files of the working tree that git lists, new ones included and ignored ones not."""
    names = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT).split("\0")
    return [name for name in names if name and (ROOT / name).exists()]


def architectures() -> list[str]:
    """The list of a wheel in setup.py, which cannot be imported: it builds."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "WHEEL_ARCHITECTURES":
            return ast.literal_eval(node.value).split(";")
    raise SystemExit("wheels: setup.py has no WHEEL_ARCHITECTURES")


# -- build


def build(kind: str, out: Path) -> dict[str, Any]:
    source = ROOT / "build" / "wheels" / kind
    shutil.rmtree(source, ignore_errors=True)
    for name in tracked_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    shutil.rmtree(out, ignore_errors=True)
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    environment.update(LAGKV_BUILD_CUDA="1" if kind == "cuda" else "0", CCACHE_DISABLE="1")
    start, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run([*pip, "--wheel-dir", str(out), str(source)], env=environment)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return {"seconds": round(time.monotonic() - start), "cpu_seconds": round(cpu)}


def wheel_in(folder: Path) -> Path:
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SystemExit(f"wheels: one wheel was expected in {folder}, found {[x.name for x in wheels]}")
    return wheels[0]


# -- checks of the file


def faults_of_tag(wheel: Path, archive: zipfile.ZipFile) -> list[str]:
    tag = "-".join(wheel.stem.split("-")[2:])
    found = []
    if not re.fullmatch(r"cp310-abi3-(manylinux_\d+_\d+|linux)_x86_64", tag):
        found.append(f"tag {tag}: cp310-abi3 for Linux was expected")
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
    metadata = Parser().parsestr(archive.read(name).decode())
    if metadata.get_all("Tag") != [tag]:
        found.append(f"the file's name says {tag}, its metadata {metadata.get_all('Tag')}")
    if metadata["Root-Is-Purelib"] != "false":
        found.append("Root-Is-Purelib: false was expected of a wheel with libraries")
    return found


def expected_files(kind: str) -> set[str]:
    package = {name for name in tracked_files() if name.startswith("lagkv_ext/")}
    libraries = {"lagkv_ext/_C.abi3.so"} | ({"lagkv_ext/_cuda.abi3.so"} if kind == "cuda" else set())
    return package | libraries | {"lagkv_vllm.py", GENERATED}


def faults_of_contents(archive: zipfile.ZipFile, kind: str) -> list[str]:
    there = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = expected_files(kind)
    found = [f"{name} is missing" for name in sorted(expected - there)]
    found += [f"{name} does not belong into the {kind} wheel" for name in sorted(there - expected)]
    if GENERATED in there:
        cuda = json.loads(archive.read(GENERATED))["cuda"]
        if cuda["built"] != (kind == "cuda"):
            found.append(f"{GENERATED} says cuda.built = {cuda['built']}")
        elif cuda["built"] and cuda["architectures"] != architectures():
            found.append(f"{GENERATED} says {cuda['architectures']}, setup.py {architectures()}")
    return found


def faults_of_library(library: Path) -> list[str]:
    """Libraries that it needs and nobody brings, and folders of the machine that built it."""
    text = run(["objdump", "-p", str(library)])
    allowed = EXTERNAL["cpu"] + (f"|{EXTERNAL['cuda']}" if library.name.startswith("_cuda") else "")
    needed = re.findall(r"^\s*NEEDED\s+(\S+)", text, re.MULTILINE)
    found = [f"{library.name} needs {name}" for name in needed if not re.fullmatch(allowed, name)]
    return found + [f"{library.name} has {x}" for x in re.findall(r"\b(?:RPATH|RUNPATH)\s+\S+", text)]


def faults_of_code(elf: str, ptx: str) -> list[str]:
    """Compares what cuobjdump lists, machine code and PTX of each source, with setup.py's list of architectures."""
    stems = sorted(path.stem for path in (ROOT / "csrc/cuda").rglob("*.cu"))
    wanted = {x.replace(".", "").replace("+PTX", ""): x.endswith("+PTX") for x in architectures()}
    found = []
    for kind, text, names in (("cubin", elf, wanted), ("ptx", ptx, [x for x, ptx in wanted.items() if ptx])):
        expected = {f"{stem}.sm_{name}.{kind}" for stem in stems for name in names}
        there = set(re.findall(rf"\S+\.sm_\d+\.{kind}$", text, re.MULTILINE))
        found += [f"no {name} in it" for name in sorted(expected - there)]
        found += [f"{name} is in it, and setup.py does not name it" for name in sorted(there - expected)]
    return found


def list_code(kind: str, library: Path) -> str:
    from tools.kernel_report import tool  # needs torch

    return run([tool("cuobjdump"), f"--list-{kind}", str(library)])


def faults(wheel: Path, kind: str) -> list[str]:
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        found = faults_of_tag(wheel, archive) + faults_of_contents(archive, kind)
        for name in archive.namelist():
            if re.search(r"\.so(\.|$)", name):
                library = Path(archive.extract(name, folder))
                found += faults_of_library(library)
                if library.name.startswith("_cuda"):
                    found += faults_of_code(list_code("elf", library), list_code("ptx", library))
    return found


def audit(wheel: Path, tools: Path) -> list[str]:
    """Shows what auditwheel says; lets abi3audit judge the use of Python's stable ABI."""
    print(run([str(tools / "bin/auditwheel"), "show", str(wheel)]).strip(), flush=True)
    command = [str(tools / "bin/abi3audit"), "--strict", "--summary", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print((done.stdout + done.stderr).strip(), flush=True)
    return [] if done.returncode == 0 else ["abi3audit: see above"]


# -- runs


def environment(folder: Path, *packages: str) -> Path:
    """A fresh virtual environment with these packages."""
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(folder)])
    run([str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--no-cache-dir", *packages])
    return folder


def try_wheel(python: str, wheel: Path, kind: str) -> str:
    """Installs, runs and removes a wheel. Returns what it said; an error is a SystemExit."""
    run([python, "-m", "pip", "install", "--quiet", str(wheel)])
    with tempfile.TemporaryDirectory() as elsewhere:
        said = run([python, str(Path(__file__).resolve()), "--smoke", kind], cwd=elsewhere).strip()
    run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "lagkv_ext"])
    return said


def smoke(kind: str) -> str:
    """Runs in the fresh environment: does the package load, say what it is, and compute the reference's answer?"""
    import torch

    toolkit = (torch.version.cuda or "none").split(".")[0]
    if kind == "cuda" and toolkit not in ("none", "13"):
        done = subprocess.run(
            [sys.executable, "-c", "import lagkv_ext"], capture_output=True, text=True, check=False
        )
        assert "ImportError" in done.stderr, f"the wheel for CUDA 13 loaded with torch {torch.__version__}"
        assert "was built with CUDA" in done.stderr, done.stderr
        return f"torch {torch.__version__}: refused: {done.stderr.strip().splitlines()[-1]}"

    import lagkv_ext
    from lagkv_ext import reference

    assert Path(lagkv_ext.__file__).is_relative_to(sys.prefix), lagkv_ext.__file__
    facts = json.loads(run([sys.executable, "-m", "lagkv_ext", "info", "--json"]))
    assert facts["build"]["cuda"]["built"] == (kind == "cuda"), facts
    status = "loaded" if kind == "cuda" else "not loaded: switched off by LAGKV_BUILD_CUDA=0"
    if toolkit == "none":
        status = "not loaded: this torch has no CUDA"
    assert facts["cuda_kernels"] == status, facts
    torch.manual_seed(0)
    for device in ["cpu", *(["cuda"] if status == "loaded" and torch.cuda.is_available() else [])]:
        key, value = torch.randn(2, 1, 2, 400, 64, dtype=torch.float64, device=device)
        for score in ("std", "cosine"):
            got = lagkv_ext.compress(key, value, lag_size=64, keep=16, sink_size=5, score=score)
            wanted = reference.compress(key, value, 5, 64, 16, score=score)
            for a, b in zip(got, wanted, strict=True):
                assert torch.equal(a, b), (device, score)
    return f"torch {torch.__version__}: CUDA kernels {status}; compress as the reference"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=KINDS, help="one of the two wheels")
    parser.add_argument("--torch", nargs="*", default=TORCH, help="releases to run with")
    parser.add_argument("--skip-build", action="store_true", help="take the wheels in dist as they are")
    parser.add_argument("--smoke", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        print(smoke(options.smoke))
        return 0

    kinds = [options.only] if options.only else KINDS
    out, wrong, record = ROOT / "dist", [], {}
    for kind in kinds:
        times = {} if options.skip_build else build(kind, out / kind)
        wheel = wheel_in(out / kind)
        with zipfile.ZipFile(wheel) as archive:
            libraries = {x.filename: x.file_size for x in archive.infolist() if x.filename.endswith(".so")}
        record[kind] = {"bytes": wheel.stat().st_size, "libraries": libraries, **times}
        print(f"{kind}: {wheel.relative_to(ROOT)}: {json.dumps(record[kind])}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tools = environment(Path(folder) / "tools", "auditwheel", "abi3audit")
        for kind in kinds:
            wheel = wheel_in(out / kind)
            wrong += [f"{kind}: {fault}" for fault in faults(wheel, kind) + audit(wheel, tools)]
        for version in options.torch:
            python = environment(Path(folder) / "torch", f"torch=={version}") / "bin/python"
            for kind in kinds:
                said = try_wheel(str(python), wheel_in(out / kind), kind)
                record[kind].setdefault("runs", []).append(said)
                print(f"{kind}: {said}", flush=True)
    (out / "wheels.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for fault in wrong:
        print(f"FAULT {fault}")
    print(f"{len(kinds)} wheels, {len(wrong)} faults; sizes and times in {out / 'wheels.json'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
