"""What NVIDIA's assembler made of a kernel: registers, spills, and how far its loads run ahead.

The machine code is read with the disassembler that Triton brings. What a GPU would do with it is
not measured: a processor of sm_90 is described by its documented limits.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
# Of a processor of sm_90: registers, in units of a warp; shared bytes, of which each program takes
# 1,024 more than it asks for; warps; programs.
_REGISTERS, _UNIT, _SHARED, _WARPS, _PROGRAMS = 1 << 16, 256, 228 << 10, 64, 32


@dataclass(frozen=True)
class Usage:
    """registers: of a thread. spill_bytes: of its stack frame, since our kernels keep no arrays."""

    registers: int
    spill_bytes: int


@dataclass(frozen=True)
class Sass:
    """instructions: of the whole kernel. loads: the most loads from global memory into registers
    that are under way before the first of them is used. groups_ahead: of asynchronous copies, the
    most groups that a wait leaves under way, None without such copies."""

    instructions: int
    loads: int
    groups_ahead: int | None


def read_usage(cubin: bytes) -> Usage:
    """What a compiled kernel needs, as its file says; quick."""
    said = _run("cuobjdump", "--dump-resource-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return Usage(int(found[1]), int(found[2]))


def read_sass(cubin: bytes) -> Sass:
    """Disassemble a compiled kernel, which takes a second."""
    found = _INSTRUCTION.findall(_run("nvdisasm", "-c", cubin))
    waits = [int(text, 16) for op, text in found if op == "DEPBAR.LE" for text in _waits(text)]
    copies = any(op.startswith("LDGSTS") for op, _ in found)
    return Sass(len(found), _loads_under_way(found), max(waits, default=0) if copies else None)


def programs_per_processor(registers: int, shared_bytes: int, warps: int) -> int:
    """Programs that run at once on a processor of sm_90."""
    of_warp = -(-registers * 32 // _UNIT) * _UNIT
    return min(
        _REGISTERS // (of_warp * warps),
        _SHARED // (shared_bytes + 1024),
        _WARPS // warps,
        _PROGRAMS,
    )


def _run(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _waits(operands: str) -> list[str]:
    return re.findall(r"^SB0, (0x[0-9a-f]+)", operands)


def _loads_under_way(instructions: list[tuple[str, str]]) -> int:
    """In the order of the code, branches not followed: an instruction that names a register of a
    load waits, and with it all loads are taken to have arrived."""
    most, under_way = 0, set[str]()
    for op, operands in instructions:
        registers = re.findall(r"\bR\d+", operands)
        is_load = op.startswith("LDG.")
        if under_way.intersection(registers[is_load:]):
            under_way.clear()
        if is_load and registers:
            under_way.add(registers[0])
            most = max(most, len(under_way))
    return most
