"""The C++ in programs of its own: one hash for every instruction set, and sanitizers.

NEON runs on any processor, with Debian's packages g++-aarch64-linux-gnu and qemu-user.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from kernels.cpp import build

pytestmark = pytest.mark.soak
SOURCE = Path(__file__).parent / "cpp/results.cpp"
HASH = "ec3a8c65c4439792"  # of float32 and bfloat16 results, whatever the instruction set


def made(compiler: list[str], isa: str, folder: Path, *options: str) -> Path:
    program = folder / "results"
    flags = [*build._FLAGS, *build._ISA_FLAGS[isa], *options]
    subprocess.run([*compiler, *flags, str(SOURCE), "-o", str(program)], check=True)
    return program


def output(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_one_hash(isa: str, tmp_path: Path) -> None:
    runs = {"avx2": ["avx2"], "avx512": ["avx2", "avx512"]}
    if isa not in runs.get(build.instruction_set(), []):
        pytest.skip(f"this processor has no {isa}")
    program = made(build._compiler(), isa, tmp_path)
    assert output(str(program), "20") == f"{HASH}, 0 wrong"


def test_one_hash_on_neon(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    program = made([compiler], "neon", tmp_path, "-static")
    assert output(emulator, str(program), "1") == f"{HASH}, 0 wrong"


@pytest.mark.parametrize("sanitizer", ["thread", "address", "undefined"])
def test_threads_side_by_side(sanitizer: str, tmp_path: Path) -> None:
    options = "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"
    program = made(build._compiler(), build.instruction_set(), tmp_path, *options)
    assert output(str(program), "20") == f"{HASH}, 0 wrong"
