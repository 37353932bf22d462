"""What a compiled kernel takes: registers and spills by the compilers' reports, instructions by the disassembly."""

from __future__ import annotations

import re


def usage_on_cuda(log: str) -> tuple[int, int, int]:
    """(registers, bytes of spills, bytes of stack) from ptxas's report."""
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    if not frames or not registers:
        raise RuntimeError("ptxas reported no registers: this Triton does not know TRITON_DUMP_PTXAS_LOG")
    stack, stores, loads = (sum(column) for column in zip(*(map(int, frame) for frame in frames), strict=True))
    return max(map(int, registers)), stores + loads, stack


def usage_on_hip(asm: str) -> tuple[int, int, int]:
    """(registers, spilled registers and bytes of scratch, bytes of scratch) from AMD's assembly."""

    def field(name: str) -> int:
        return max(int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", asm))

    scratch = field("private_segment_fixed_size")
    return (
        field("vgpr_count") + field("agpr_count"),
        field("vgpr_spill_count") + field("sgpr_spill_count") + scratch,
        scratch,
    )


def innermost_loops(sass: str) -> list[list[str]]:
    """The instructions of each loop that holds no other: from the target of a branch backwards to the branch."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    code = [(int(address, 16), text) for address, text in lines if not text.startswith("NOP")]
    loops = []
    for at, text in code:
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if branch and int(branch[1], 16) < at:
            loops.append((int(branch[1], 16), at))

    def holds(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
        return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]

    innermost = [loop for loop in loops if not any(holds(loop, other) for other in loops)]
    return [[text for at, text in code if first <= at <= last] for first, last in innermost]


def elements(loop: list[str], columns: int, threads: int) -> float:
    """What a thread takes in one turn of a loop that takes `columns` in all, times the copies that ptxas made of it.

    The copies: what the counter goes up by, over `columns`. Of the registers that go up by a multiple of it, the
    counter is that with the smallest; others are addresses, in bytes. Without a counter these would pass for more
    copies than there are: so no more are believed than the loop's accesses have room for, 16 bytes each of 2 an
    element.
    """
    # A register that goes up by a constant: IADD R, R, constant, under its several names.
    increment = re.compile(r"\bU?(?:VI|I)ADD\S* (U?R\d+), (?:U?P\d, )?\1(?:\.reuse)?, (0x[0-9a-f]+)")
    steps = [int(found[2], 16) for found in map(increment.search, loop) if found]
    copies = min((step // columns for step in steps if step % columns == 0 and step), default=1)
    accesses = max(sum(kind in text for text in loop) for kind in ("LDG.", "STG."))
    return columns / threads * max(1, min(copies, 8 * accesses * threads // columns))
