"""Where a figure comes from: machine, versions, date and command, in every benchmark's JSON."""

import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton

from bench.timing import ON_GPU

ROOT = Path(__file__).parent.parent


def provenance() -> dict[str, Any]:
    """For JSON; None for what cannot be told.

    machine: the processor's model, how many processors there are, and the GPU's name. versions:
    python, torch and triton, the commit, and whether the tree has changes since (`modified`).
    date: UTC. command: as it was typed, the interpreter without its path.
    """
    status = said_by("git", "status", "--porcelain")
    return {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if ON_GPU else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "commit": said_by("git", "rev-parse", "HEAD"),
            "modified": None if status is None else bool(status),
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def processor() -> str | None:
    """The processor's model, by lscpu or /proc/cpuinfo."""
    lines = (said_by("lscpu") or "").splitlines()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines += cpuinfo.read_text().splitlines()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip().lower() == "model name":
            return value.strip()
    return None


def said_by(*command: str) -> str | None:
    """What a program printed; None without it, or where it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def print_json(figures: dict[str, Any]) -> None:
    """Print the one line that a benchmark ends in, with its provenance."""
    print(json.dumps(figures | {"run": provenance()}))
