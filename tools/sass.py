"""Reads machine code as ``cuobjdump -sass`` prints it: instructions by function, and the loop that streams rows."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  #: with its modifiers
    operands: str

    @property
    def load_bits(self) -> int:
        """Width of a streaming load (ld_global_nc_stream, which passes L1 by); 0: another instruction."""
        found = re.match(r"LDG\.E((?:\.\w+)*)$", self.opcode)
        if not found or ".NA" not in found[1]:
            return 0
        width = re.search(r"\.[US]?(8|16|64|128)(?=\.|$)", re.sub(r"LTC\d+B", "", found[1]))
        return int(width[1]) if width else 32

    @property
    def jumps_back_to(self) -> int | None:
        found = re.search(r"\b0x([0-9a-f]+)$", self.operands)
        if not found or not re.match(r"BRA(\.|$)", self.opcode) or int(found[1], 16) >= self.address:
            return None
        return int(found[1], 16)


def functions(text: str) -> dict[str, list[Instruction]]:
    """Instructions by the symbol of their function."""
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    pattern = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\w\S*)\s*([^;]*?)\s*;")
    for line in text.splitlines():
        if function := re.search(r"Function : (\S+)", line):
            code = found.setdefault(function[1], [])
        elif instruction := pattern.match(line):
            code.append(Instruction(int(instruction[1], 16), instruction[2], instruction[3]))
    return found


def streaming_loop(code: list[Instruction]) -> list[Instruction]:
    """Finds the loop that reads rows and scores them; empty where there is none.

    - A loop is the code from the target of a backward branch to the last branch to that target.
    - The streaming loop contains no other loop, has streaming loads, and has shuffles, which sum a row over its lanes.
      Loops that copy rows or make bounds alone have no shuffles.
    - Cosine has two such loops, with and without scores. The longer one scores.
    - A range with an EXIT or a RET is no loop: code for diverged warps lies behind the kernel and jumps back into it.
    """
    ends: dict[int, int] = {}
    for instruction in code:
        target = instruction.jumps_back_to
        if target is not None:
            ends[target] = max(instruction.address, ends.get(target, 0))
    bodies = []
    for start, end in ends.items():
        inner = any(start <= s and e <= end and (s, e) != (start, end) for s, e in ends.items())
        body = [x for x in code if start <= x.address <= end]
        kinds = {x.opcode.split(".")[0] for x in body}
        if not inner and not kinds & {"EXIT", "RET"} and "SHFL" in kinds and any(x.load_bits for x in body):
            bodies.append(body)
    return max(bodies, key=len, default=[])


def per_kib(loop: list[Instruction]) -> float:
    """Counts instructions of a warp per KiB of rows, where all lanes read.

    Each instruction takes an issue slot, whether its predicate holds or not. Subroutines do not count (square roots
    of denormal numbers); the branches around their calls do.
    """
    return len(loop) * 1024 / sum(instruction.load_bits // 8 * 32 for instruction in loop)
