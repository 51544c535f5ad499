"""The compiler's report finds the streaming loop in machine code, counts it and holds it against its budget."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "tools" / "sass.py").exists():
    pytest.skip("no tools here: tests run outside a checkout", allow_module_level=True)
sys.path.insert(0, str(ROOT))  # tools is a package of the checkout, not of the installation

from tools import instruction_budget, sass  # noqa: E402

LOAD = "LDG.E.NA.LTC128B.128.CONSTANT R4, desc[UR8][R6.64]"
# As cuobjdump prints it. A loop over partitions (10 to e0) with four loops inside: rows that are copied (20), bounds
# alone (50), scores (80); behind EXIT a block for diverged warps, which jumps back to the middle of the last one.
CODE = {
    0x00: "MOV R1, c[0x0][0x28]",
    0x10: "S2R R0, SR_TID.X",
    0x20: LOAD,
    0x30: "STG.E.128 desc[UR8][R2.64], R4",
    0x40: "@P0 BRA 0x20",
    0x50: LOAD,
    0x60: "HMNMX2.BF16_V2.NAN R3, R3, R4, !PT",
    0x70: "@P1 BRA 0x50",
    0x80: f"@!P2 {LOAD}",
    0x90: f"@!P2 {LOAD}",
    0xA0: "BRA.DIV UR4, 0x110",
    0xB0: "SHFL.BFLY PT, R5, R4, 0x8, 0x1f",
    0xC0: "FFMA R3, R66, R66, R3",
    0xD0: "@!UP3 BRA.U 0x80",
    0xE0: "@P0 BRA P1, 0x10",
    0xF0: "@P4 BRA 0x200",
    0x100: "EXIT",
    0x110: "WARPSYNC.COLLECTIVE R9, 0x120",
    0x120: "SHFL.BFLY PT, R5, R4, 0x8, 0x1f",
    0x130: "BRA 0x90",
    0x140: "BRA 0x140",
}


def printed(code: dict[int, str], name: str = "_Z6kernel") -> str:
    lines = [f"\t\tFunction : {name}", '\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"']
    for address, text in code.items():
        predicate = "" if text.startswith("@") else 8 * " "
        lines.append(f"        /*{address:04x}*/  {predicate}{text} ;   /* 0x000000ffff057224 */")
        lines.append("                                         /* 0x000fe200078e00ff */")
    return "\n".join(lines)


def test_instructions_of_each_function():
    found = sass.functions(printed(CODE, "first") + "\n" + printed({0: "EXIT"}, "second"))
    assert list(found) == ["first", "second"]
    assert [x.address for x in found["first"]] == list(CODE)
    assert found["first"][8] == sass.Instruction(0x80, *LOAD.split(" ", 1))
    assert found["second"] == [sass.Instruction(0, "EXIT", "")]


def test_the_loop_that_scores_is_found_and_counted():
    (code,) = sass.functions(printed(CODE)).values()
    loop = sass.streaming_loop(code)
    assert [x.address for x in loop] == [0x80, 0x90, 0xA0, 0xB0, 0xC0, 0xD0]
    assert sass.per_kib(loop) == 6  # two loads of 16 bytes by 32 lanes: 1 KiB


@pytest.mark.parametrize("without", ["LDG", "SHFL", "BRA"])
def test_code_without_a_streaming_loop(without):
    text = {address: line for address, line in CODE.items() if not re.search(rf"\b{without}\b", line)}
    (code,) = sass.functions(printed(text)).values()
    assert sass.streaming_loop(code) == []


def test_of_two_loops_the_longer_one_scores():
    both = {**CODE, 0x60: "SHFL.BFLY PT, R5, R4, 0x8, 0x1f"}
    (code,) = sass.functions(printed(both)).values()
    assert sass.streaming_loop(code)[0].address == 0x80


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [
        ("LDG.E.NA.LTC128B.128.CONSTANT", 128),
        ("LDG.E.NA.LTC128B.64.CONSTANT", 64),
        ("LDG.E.NA.LTC128B.CONSTANT", 32),
        ("LDG.E.U16.NA.LTC128B.CONSTANT", 16),
        ("LDG.E.128.CONSTANT", 0),
        ("STG.E.128", 0),
    ],
)
def test_width_of_streaming_loads(opcode, bits):
    assert sass.Instruction(0, opcode, "R4, desc[UR8][R6.64]").load_bits == bits


def test_a_loop_above_its_budget_fails():
    budgets = {"sm_90": {"a": 100, "b": 50, "c": 70, "d": 80}, "sm_80": {"a": 1}}
    counts = {"sm_90": {"a": 100.0, "b": 50.5, "c": 0.0, "other": 999.0}}
    assert instruction_budget.faults(counts, budgets) == [
        "sm_90 b: 50.5 instructions per KiB, the budget is 50",
        "sm_90 c: no streaming loop was found",
        "sm_90 d: has a budget, but there is no such kernel",
    ]
    rows = instruction_budget.table(counts, budgets).splitlines()[4:]
    assert rows == ["| `a` | H100 | 100.0 | 100 | 35% |", "| `b` | H100 | 50.5 | 50 | 18% |"]


def test_the_budgets_hold_what_was_asked_for():
    """Issue slots of an H100 at 3.35 TB/s: 227 instructions per KiB took 80%."""
    assert round(instruction_budget.CARDS["sm_90"].share(227), 2) == 0.80
    budgets = instruction_budget.load()
    assert set(budgets) == set(instruction_budget.CARDS)
    for kernel in ("compress_kernel", "ragged_kernel", "blocks_kernel"):
        for layout, std, cosine in (
            ("bfloat16, 8, 16, 1", 175, 190),
            ("float16, 8, 16, 1", 175, 190),
            ("float, 4, 32, 1", 130, 130),
        ):
            for arch in budgets:
                assert budgets[arch][f"{kernel}<Row<{layout}>, std>"] <= std
                assert budgets[arch][f"{kernel}<Row<{layout}>, cosine>"] <= cosine
