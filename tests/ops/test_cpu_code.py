"""Machine code of the CPU kernels: things that no result shows, read from the library's disassembly.

Each happened or nearly did: GCC 12 dropped every prefetch of a loop that "does nothing", and an inline function that
the linker takes from the AVX-512 object instead of the portable one ends the process on an older processor.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

import lagkv_ext

LIBRARY = Path(lagkv_ext.__file__).parent / "_C.abi3.so"
LEVELS = ("portable", "avx2", "avx512")
# Passes over rows in memory; the others work on what these leave in the caches.
STREAMING = re.compile(r"cpu::(\w+)::(bounds_16bit|bounds_floating|std_tile_sized|cosine_tile)<")

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86-64"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)"),
]


@pytest.fixture(scope="module")
def functions() -> dict[str, str]:
    """Disassembly of every function of the CPU library by its demangled name."""
    done = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    found = defaultdict(str)
    for part in re.split(r"\n(?=[0-9a-f]+ <)", done.stdout):
        if heading := re.match(r"[0-9a-f]+ <(.*)>:\n", part):
            found[heading[1]] += part[heading.end() :]
    return found


def level(name: str) -> str:
    found = re.search(r"lagkv::cpu::(avx2|avx512)::", name)
    return found[1] if found else "portable"


def test_no_function_leaves_its_instruction_set(functions):
    """Whatever is not in the namespace of a level must run everywhere: the host code, libraries' templates."""
    forbidden = {"portable": r":\tv", "avx2": r"%zmm|%k[0-7]\b", "avx512": r"$^"}
    wrong = [name for name, code in functions.items() if re.search(forbidden[level(name)], code)]
    assert wrong == []


@pytest.mark.parametrize(("isa", "register"), [("portable", "xmm"), ("avx2", "ymm"), ("avx512", "zmm")])
def test_streaming_kernels_use_the_widest_registers_and_prefetch(functions, isa, register):
    kernels = {
        name: code for name, code in functions.items() if (m := STREAMING.search(name)) and m[1] == isa
    }
    assert {STREAMING.search(name)[2] for name in kernels} == {
        "bounds_16bit",
        "bounds_floating",
        "std_tile_sized",
        "cosine_tile",
    }
    assert [name for name, code in kernels.items() if f"%{register}" not in code] == []
    # Two doubles in a register are fewer than the four rows that are fetched ahead together: taken one by one there.
    wanted = {name: code for name, code in kernels.items() if isa != "portable" or "<double" not in name}
    assert [name for name, code in wanted.items() if "prefetch" not in code] == []
