"""What the device can do at most, measured in the run that reports fractions of it.

Bandwidth is the larger of a copy's (bytes read and written) and of a pass that only reads; the
matrix product is on random data, since zeros draw less power and run faster.
"""

import statistics
import sys
from dataclasses import asdict, dataclass
from functools import partial

import torch

from bench.provenance import print_json
from bench.timing import DEVICE, ON_GPU, Call, Rotation
from engine import command

_BYTES = 2 << 30 if ON_GPU else 256 << 20
_SIZE = 8192 if ON_GPU else 1536
_REPEATS = 15 if ON_GPU else 7


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of a device; `matmul_dtype` is what its products were in."""

    copy_gb_per_s: float
    read_gb_per_s: float
    matmul_tflop_per_s: float
    matmul_dtype: str

    @property
    def gb_per_s(self) -> float:
        """The larger bandwidth."""
        return max(self.copy_gb_per_s, self.read_gb_per_s)

    def floor_ms(self, num_bytes: int, flops: int) -> tuple[float, str]:
        """The least time that moving the bytes and doing the operations takes, and which of the two
        it is: "memory" or "compute"."""
        memory = num_bytes / self.gb_per_s * 1e-6
        compute = flops / self.matmul_tflop_per_s * 1e-9
        return max((memory, "memory"), (compute, "compute"))

    def describe(self) -> str:
        """One line for a person."""
        return (
            f"ceilings: copy {self.copy_gb_per_s:,.0f} GB/s, read {self.read_gb_per_s:,.0f} GB/s, "
            f"{self.matmul_dtype} matmul {self.matmul_tflop_per_s:,.3g} TFLOP/s"
        )


def measure_ceilings() -> Ceilings:
    """Measure the device; a second or two."""
    source = torch.ones(_BYTES // 2, dtype=torch.bfloat16, device=DEVICE)
    copy = _median(partial(torch.empty_like(source).copy_, source))
    # A sum of bfloat16 may be bound by its conversions, one of float32 is not.
    reads = [_median(partial(torch.sum, x)) for x in (source, source.view(torch.float32))]
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    a, b = (torch.randn(_SIZE, _SIZE, device=DEVICE).to(dtype) for _ in range(2))
    product = _median(partial(torch.matmul, a, b))
    return Ceilings(
        copy_gb_per_s=2 * _BYTES / copy * 1e-6,
        read_gb_per_s=_BYTES / min(reads) * 1e-6,
        matmul_tflop_per_s=2 * _SIZE**3 / product * 1e-9,
        matmul_dtype=str(dtype).removeprefix("torch."),
    )


def _median(call: Call) -> float:
    rotation = Rotation([call])
    return statistics.median(rotation.time_ms() for _ in range(_REPEATS))


def main() -> None:
    """Print the ceilings of this machine's device."""
    ceilings = measure_ceilings()
    print(ceilings.describe())
    print_json(asdict(ceilings))


if __name__ == "__main__":
    sys.exit(command.run(main))
