"""Target: a frozen description of one device, as the plans, the compiler and the model of time need it.

What it is: numbers of a data sheet, named like ``cuda:90``. What it is not: nothing here asks the machine it runs on.
"""

from __future__ import annotations

from dataclasses import dataclass


class UnknownTarget(Exception):
    """Says which targets there are."""


@dataclass(frozen=True)
class Target:
    """One device. Bytes, bytes a second and FLOPs a second; a "processor" is an SM or a compute unit."""

    name: str
    backend: str  # cuda, hip or cpu
    arch: str  # as Triton names it: 90, gfx942; empty for cpu
    device: str  # the product whose numbers these are
    processors: int = 0
    warp_size: int = 0
    shared_bytes: int = 0  # the most that one program may ask for
    registers: int = 0  # 32-bit, of one processor
    registers_per_thread: int = 0
    threads: int = 0  # resident on one processor
    l2_bytes: int = 0
    bandwidth: float = 0.0  # of device memory
    tensor_flops: float = 0.0  # dense, bfloat16 in, float32 out
    clock: float = 0.0  # Hz, boost
    source: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.device})"


_CUDA = "CUDA C++ Programming Guide 13, table of compute capabilities"

TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            "cuda:80",
            "cuda",
            "80",
            "A100 SXM 80 GB",
            processors=108,
            warp_size=32,
            shared_bytes=166_912,
            registers=65_536,
            registers_per_thread=255,
            threads=2048,
            l2_bytes=40 << 20,
            bandwidth=2.04e12,
            tensor_flops=312e12,
            clock=1.41e9,
            source=f"{_CUDA}; NVIDIA A100 data sheet",
        ),
        Target(
            "cuda:86",
            "cuda",
            "86",
            "RTX A6000",
            processors=84,
            warp_size=32,
            shared_bytes=101_376,
            registers=65_536,
            registers_per_thread=255,
            threads=1536,
            l2_bytes=6 << 20,
            bandwidth=0.768e12,
            tensor_flops=155e12,
            clock=1.80e9,
            source=f"{_CUDA}; NVIDIA GA102 architecture whitepaper",
        ),
        Target(
            "cuda:89",
            "cuda",
            "89",
            "L40S",
            processors=142,
            warp_size=32,
            shared_bytes=101_376,
            registers=65_536,
            registers_per_thread=255,
            threads=1536,
            l2_bytes=96 << 20,
            bandwidth=0.864e12,
            tensor_flops=362e12,
            clock=2.52e9,
            source=f"{_CUDA}; NVIDIA L40S data sheet",
        ),
        Target(
            "cuda:90",
            "cuda",
            "90",
            "H100 SXM 80 GB",
            processors=132,
            warp_size=32,
            shared_bytes=232_448,
            registers=65_536,
            registers_per_thread=255,
            threads=2048,
            l2_bytes=50 << 20,
            bandwidth=3.35e12,
            tensor_flops=989e12,
            clock=1.755e9,
            source=f"{_CUDA}; NVIDIA H100 data sheet",
        ),
        Target(
            "cuda:100",
            "cuda",
            "100",
            "B200",
            processors=148,
            warp_size=32,
            shared_bytes=232_448,
            registers=65_536,
            registers_per_thread=255,
            threads=2048,
            l2_bytes=126 << 20,
            bandwidth=8.0e12,
            tensor_flops=2250e12,
            clock=1.85e9,
            source=f"{_CUDA}; NVIDIA DGX B200 data sheet",
        ),
        Target(
            "cuda:120",
            "cuda",
            "120",
            "GeForce RTX 5090",
            processors=170,
            warp_size=32,
            shared_bytes=101_376,
            registers=65_536,
            registers_per_thread=255,
            threads=1536,
            l2_bytes=96 << 20,
            bandwidth=1.792e12,
            tensor_flops=209.5e12,
            clock=2.41e9,
            source=f"{_CUDA}; NVIDIA RTX Blackwell architecture whitepaper",
        ),
        Target(
            "hip:gfx942",
            "hip",
            "gfx942",
            "Instinct MI300X",
            processors=304,
            warp_size=64,
            shared_bytes=65_536,
            registers=131_072,
            registers_per_thread=512,
            threads=2048,
            l2_bytes=4 << 20,
            bandwidth=5.3e12,
            tensor_flops=1307e12,
            clock=2.1e9,
            source="AMD CDNA 3 ISA reference guide and architecture whitepaper; MI300X data sheet",
        ),
        Target("cpu", "cpu", "", "this machine's own CPU", source="nothing: the C++ backend measures"),
    )
}


def find(name: str) -> Target:
    """Returns the target called ``name``; raises UnknownTarget."""
    if name not in TARGETS:
        raise UnknownTarget(f"no target is called {name!r}; there are {', '.join(TARGETS)}")
    return TARGETS[name]
