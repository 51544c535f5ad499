"""Reports on the compiled CUDA kernels: registers, shared memory, spills, occupancy, loads, instructions per byte.

``python -m tools.kernel_report [--arch sm_80 sm_90] [--out FILE]``: compiles csrc/cuda/*.cu for each architecture,
reads ``ptxas -v`` and the disassembly, and prints two tables (``--out``: also to a file). No GPU is needed. Ends with
status 1 where a kernel spills, where the streaming loads of a vector layout are not 128 bits wide, where fewer blocks
than the planner counts on fit a multiprocessor, or where a streaming loop exceeds its budget of instructions.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from torch.utils.cpp_extension import CUDA_HOME, include_paths

from tools import instruction_budget, sass

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    *("-std=c++17", "-O3", "-Xptxas", "-v", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
    *("-DPy_LIMITED_API=0x030A0000", f"-I{ROOT / 'csrc'}"),
]
LAG_SIZE = 128  # of the shared memory that occupancy is computed for


@dataclasses.dataclass
class Kernel:
    """One instantiation on one architecture."""

    arch: str
    symbol: str
    name: str
    registers: int
    static_shared: int
    stack: int
    spills: int  #: bytes, stores and loads
    loads: Counter[int] = dataclasses.field(default_factory=Counter)  #: streaming loads by bits
    per_kib: float = 0  #: instructions of the streaming loop; 0: it has none
    dynamic_shared: int = 0
    blocks: int = 0  #: per multiprocessor
    planned: int = 0  #: per multiprocessor, as the launch planner counts
    occupancy: int = 0  #: percent of its warps

    @property
    def layout(self) -> tuple[str, int, int, int] | None:
        """(element type, elements, lanes, chunks) of a kernel of a streaming layout."""
        found = re.search(r"Row<(\w+), (\d+), (\d+), (\d+)>", self.name)
        return (found[1], int(found[2]), int(found[3]), int(found[4])) if found else None

    @property
    def scores(self) -> bool:
        return self.name.startswith(("compress_kernel", "ragged_kernel", "blocks_kernel"))

    @property
    def ragged(self) -> bool:
        """Looks up where rows lie."""
        return self.name.startswith(("ragged", "blocks"))

    @property
    def blends(self) -> bool:
        return self.scores and self.name.endswith("blend>")

    def faults(self) -> list[str]:
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} bytes of spills, {self.stack} bytes of stack")
        if self.layout and self.layout[1] > 1:
            narrow = [f"{count} of {bits}" for bits, count in self.loads.items() if bits != 128]
            if narrow or not self.loads:
                found.append(
                    f"streaming loads are not all 128 bits wide: {', '.join(narrow) or 'none found'}"
                )
        if self.blocks < self.planned:
            found.append(f"{self.blocks} blocks fit a multiprocessor, the planner counts on {self.planned}")
        return found


def tool(name: str) -> str:
    """A CUDA tool: of the toolkit, on the PATH, or among those that come with the triton package."""
    folders = [f"{CUDA_HOME}/bin" if CUDA_HOME else "", *os.environ["PATH"].split(os.pathsep)]
    spec = importlib.util.find_spec("triton")
    for location in spec.submodule_search_locations or [] if spec else []:
        folders.append(f"{location}/backends/nvidia/bin")
    found = shutil.which(name, path=os.pathsep.join(filter(None, folders)))
    if found is None:
        raise SystemExit(
            f"kernel_report: {name} was not found (CUDA_HOME={CUDA_HOME}, PATH, the triton package)"
        )
    return found


def run(command: list[str], **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        raise SystemExit(f"kernel_report: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_one(source: Path, arch: str, folder: Path) -> tuple[Path, str]:
    target = folder / f"{source.stem}.{arch}.o"
    ccache = [path for path in [shutil.which("ccache")] if path]
    includes = [f"-I{path}" for path in include_paths()]
    return target, run(
        [
            *ccache,
            f"{CUDA_HOME}/bin/nvcc",
            *FLAGS,
            *includes,
            f"-arch={arch}",
            "-c",
            str(source),
            "-o",
            str(target),
        ]
    )


def parse(report: str, arch: str) -> list[Kernel]:
    kernels = []
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '\w+'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    for symbol, stack, stores, loads, registers, rest in pattern.findall(report):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(
            Kernel(
                arch,
                symbol,
                "",
                int(registers),
                int(shared[1]) if shared else 0,
                int(stack),
                int(stores) + int(loads),
            )
        )
    return kernels


def short_name(symbol: str) -> str:
    name = run(["c++filt", symbol]).strip()
    name = re.sub(r"^void |\(lagkv::cuda::\w+Launch<.*$|lagkv::cuda::|lagkv::", "", name)
    name = name.replace("(Score)0", "std").replace("(Score)1", "cosine").replace("(Score)2", "blend")
    return name.replace("__nv_bfloat16", "bfloat16").replace("__half", "float16")


def read_code(target: Path, kernels: list[Kernel]) -> None:
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ["PATH"]]),
    }
    code = sass.functions(run([tool("cuobjdump"), "-sass", str(target)], env=environment))
    for kernel in kernels:
        kernel.loads = Counter(x.load_bits for x in code[kernel.symbol] if x.load_bits)
        if loop := sass.streaming_loop(code[kernel.symbol]):
            kernel.per_kib = sass.per_kib(loop)


def add_occupancy(kernels: list[Kernel], folder: Path) -> None:
    program = folder / "occupancy"
    compiler = os.environ.get("CXX", "c++").split()
    run(
        [
            *compiler,
            "-std=c++17",
            f"-I{CUDA_HOME}/include",
            str(ROOT / "tools" / "occupancy.cpp"),
            "-o",
            str(program),
        ]
    )
    sizes = {"float16": 2, "bfloat16": 2, "float": 4, "double": 8}
    lines = []
    for kernel in kernels:
        start = f"{kernel.arch.removeprefix('sm_')} {kernel.registers} {kernel.static_shared}"
        if kernel.scores and kernel.layout:
            kind, elements, lanes, chunks = kernel.layout
            lines.append(
                f"{start} {elements} {lanes} {chunks} {sizes[kind]} {elements * lanes * chunks} {LAG_SIZE} "
                f"{int(kernel.ragged)} {int(kernel.blends)}"
            )
        else:
            lines.append(f"{start} {512 if 'move_kernel' in kernel.name else 256} 0")
    answers = run([str(program)], input="\n".join(lines) + "\n").splitlines()
    for kernel, answer in zip(kernels, answers, strict=True):
        kernel.blocks, kernel.occupancy, kernel.dynamic_shared, kernel.planned = map(int, answer.split())


def table(kernels: list[Kernel]) -> str:
    rows = [
        f"Shared memory: static + dynamic, for L = {LAG_SIZE} and the widest D of the layout. "
        "Row<T, elements, lanes, chunks>: a lane reads `chunks` times `elements` elements of a row.\n",
        "| kernel | GPU | registers | shared bytes | spill bytes | blocks per SM | occupancy | streaming loads "
        "| instructions per KiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kernel in sorted(kernels, key=lambda kernel: (kernel.name, kernel.arch)):
        loads = ", ".join(f"{count} x {bits} bit" for bits, count in sorted(kernel.loads.items())) or "-"
        card = instruction_budget.CARDS[kernel.arch].name
        rows.append(
            f"| `{kernel.name}` | {card} | {kernel.registers} "
            f"| {kernel.static_shared} + {kernel.dynamic_shared} | {kernel.spills} "
            f"| {kernel.blocks} | {kernel.occupancy} % | {loads} "
            f"| {kernel.per_kib:.1f} |"
        )
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90"], choices=["sm_80", "sm_90"])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "kernel-report.md")
    options = parser.parse_args()
    if CUDA_HOME is None:
        raise SystemExit("kernel_report: no CUDA toolkit was found; set CUDA_HOME")
    folder = ROOT / "build" / "kernel-report"
    folder.mkdir(parents=True, exist_ok=True)

    sources = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
    jobs = [(source, arch) for arch in options.arch for source in sources]
    kernels: list[Kernel] = []
    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        built = pool.map(lambda job: compile_one(*job, folder), jobs)
        for (source, arch), (target, report) in zip(jobs, built, strict=True):
            found = parse(report, arch)
            if not found:
                raise SystemExit(f"kernel_report: the compiler reported no kernel for {source.name}")
            for kernel in found:
                kernel.name = short_name(kernel.symbol)
            read_code(target, found)
            kernels += found
            print(f"{arch} {source.name}: {len(found)} kernels", file=sys.stderr)
    add_occupancy(kernels, folder)

    budgets = instruction_budget.load()
    counts: dict[str, dict[str, float]] = {arch: {} for arch in options.arch}
    for kernel in kernels:
        counts[kernel.arch][kernel.name] = kernel.per_kib
    text = table(kernels) + "\n" + instruction_budget.table(counts, budgets)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(text)
    faults = [f"{kernel.arch} {kernel.name}: {fault}" for kernel in kernels for fault in kernel.faults()]
    faults += instruction_budget.faults(counts, budgets)
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"{len(kernels)} kernels, {len(faults)} faults; table in {options.out}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
