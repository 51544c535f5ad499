"""The steps in order of worth, on a card and in a rehearsal without one."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path

from tools.gpu_check.steps import Step

EXAMPLES = "tests/ops/test_examples.py"
# Further questions to a card before it is timed: streams, graphs, no wait for the device, the static cache.
FIRST_ON_CARD = (
    "tests/cuda/test_gpu.py::test_launches_on_the_current_stream",
    "tests/cuda/test_gpu.py::test_never_waits_for_the_device",
    "tests/cuda/test_gpu.py::test_captured_in_a_graph",
    "tests/cuda/test_ragged_gpu.py::test_a_captured_graph_follows_the_lengths",
    "tests/cache/test_static_compile.py::test_a_captured_step_is_replayed_as_the_cache_fills_and_starts_again",
)
SANITIZER_SELECTION = "bfloat16 or float32"
KERNELS = "lagkv"  # in the mangled name of every kernel of this project
SANITIZER_FAULT = r"^=+ (Invalid |Error: |Warning: .*hazard|Uninitialized |Program hit )|ERROR SUMMARY: [1-9]"
# gVisor: no device for the sanitizer. ERR_NVGPUCTRPERM: counters are the administrator's.
SANITIZER_REFUSAL = r"Device not supported"
NCU_REFUSAL = r"LibraryNotLoaded|ERR_NVGPUCTRPERM|Failed to initialize the profiler"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Facts that the plan depends on."""

    capability: str | None  #: of the card, as "9.0"; None: a rehearsal
    folder: Path  #: of the results
    cores: int
    sanitizer: str | None
    ncu: str | None
    xdist: bool
    backend: str = "cuda"  #: of the tests; in a rehearsal the one that stands for the card

    @classmethod
    def here(cls, capability: str | None, folder: Path, backend: str = "cuda") -> Machine:
        return cls(
            capability,
            folder,
            backend=backend,
            cores=len(os.sched_getaffinity(0)),
            sanitizer=cuda_tool("compute-sanitizer"),
            ncu=cuda_tool("ncu"),
            xdist=importlib.util.find_spec("xdist") is not None,
        )


def cuda_tool(name: str) -> str | None:
    """On the PATH, in the CUDA toolkit, or where Nsight Compute's own installer puts it."""
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    homes += sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, homes)]))


def steps(m: Machine) -> list[Step]:
    return [
        _build(m),
        _tests(m, "examples", [EXAMPLES, *(FIRST_ON_CARD if m.capability else ())], share=14, least_s=20),
        _benchmarks(m),
        _counters(m),
        _sanitizer(m, "memcheck"),
        _sanitizer(m, "racecheck"),
        _properties(m),
    ]


def _python(*words: object) -> tuple[str, ...]:
    return (sys.executable, *map(str, words))


def _build(m: Machine) -> Step:
    """A generous share: nothing else runs without it, and what it does not use goes to the others."""
    environment = {"MAX_JOBS": str(m.cores)}
    if m.capability:
        environment |= {"TORCH_CUDA_ARCH_LIST": m.capability, "LAGKV_BUILD_CUDA": "1"}
        return Step("build", _python("setup.py", "build_ext", "--inplace"), share=60, environment=environment)
    return Step("build", _python("-m", "lagkv_ext", "info"), share=60)


def _tests(
    m: Machine, name: str, selection: list[str], *, share: float, least_s: float, **options: object
) -> Step:
    """A selection of the tests on the card; a card that they do not see is a failure, not a suite of skips."""
    path = m.folder / f"tests-{name.replace(' ', '-')}.jsonl"
    backend = ("--backend", m.backend, "--require-backend", m.backend)
    # No cache folder: a copy of the tree may be read-only, and nobody reads it afterwards.
    plugins = ("-p", "tools.gpu_check.progress", "-p", "no:cacheprovider")
    return Step(
        name,
        _python("-m", "pytest", "-q", *plugins, *backend, *selection),
        share=share,
        least_s=least_s,
        environment={"LAGKV_PROGRESS": str(path), "OMP_NUM_THREADS": "1"},
        tests=path,
        **options,
    )


def _benchmarks(m: Machine) -> Step:
    device = ("--device", "cuda") if m.capability else ("--device", "cpu", "--tiny")
    return Step(
        "benchmarks",
        _python("-m", "benchmarks.card", *device, "--json", m.folder / "benchmarks.json"),
        share=32,
        least_s=20,
    )


def _counters(m: Machine) -> Step:
    absent = "" if m.ncu else "ncu is not on the PATH, in CUDA_HOME/bin or /opt/nvidia/nsight-compute"
    device = () if m.capability else ("--device", "cpu", "--tiny")
    return Step(
        "counters",
        _python(
            "-m",
            "tools.gpu_check.counters",
            *device,
            *("--ncu", m.ncu or "ncu", "--json", m.folder / "counters.json"),
        ),
        share=12,
        least_s=20,
        absent=absent,
        refusal=NCU_REFUSAL,
        environment={"LC_ALL": "C"},  # numbers with a decimal point
    )


def _sanitizer(m: Machine, tool: str) -> Step:
    """The examples under compute-sanitizer, this project's kernels alone: torch's are not ours to check."""
    step = _tests(m, tool, [EXAMPLES, "-k", SANITIZER_SELECTION], share=8, least_s=20)
    command = (
        m.sanitizer or "compute-sanitizer",
        *("--tool", tool, "--kernel-name", f"kernel_substring={KERNELS}", "--error-exitcode", "9"),
        *step.command,
    )
    return dataclasses.replace(
        step,
        command=command,
        # The caching allocator hides overruns: every tensor its own allocation.
        environment={**step.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        absent="" if m.sanitizer else "compute-sanitizer is not on the PATH or in CUDA_HOME/bin",
        fault=SANITIZER_FAULT,
        refusal=SANITIZER_REFUSAL,
    )


def _properties(m: Machine) -> Step:
    """Every test that needs a card; where all passed, again with many more examples, until the time is up."""
    workers = ("-n", str(max(1, min(12, m.cores - 2)))) if m.xdist else ()
    selection = ["-m", "gpu", *workers]
    profiles = ("ci", "thorough")
    if not m.capability:
        selection = ["tests/ops/test_properties.py", "-k", "partition_bounds"]
        profiles = ("dev", "dev")
    step = _tests(m, "properties", selection, share=15, least_s=20, until_the_end=True)
    passes = [shlex.join([*step.command, "--hypothesis-profile", profile]) for profile in profiles]
    return dataclasses.replace(step, command=("/bin/sh", "-c", " && ".join(passes)))
