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
    shared_of_processor: int = 0
    shared_reserved: int = 0  # that each program takes beside what it asks for
    registers: int = 0  # 32-bit, of one processor
    registers_per_thread: int = 0
    threads: int = 0  # resident on one processor
    l2_bytes: int = 0
    bandwidth: float = 0.0  # of device memory
    tensor_flops: float = 0.0  # dense, bfloat16 in, float32 out
    clock: float = 0.0  # Hz, boost
    cores: int = 0  # of a CPU
    lanes: int = 0  # float32 values of a CPU's vector
    caches: tuple[tuple[str, int], ...] = ()  # of a CPU: name and bytes, the nearest first
    source: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.device})"


def _cuda(
    arch: str,
    device: str,
    processors: int,
    shared_bytes: int,
    threads: int,
    l2: int,
    bandwidth: float,
    flops: float,
    clock: float,
    sheet: str,
) -> Target:
    """Describes an NVIDIA device; all of these have 64 K registers a processor, 255 a thread, and warps of 32."""
    return Target(
        f"cuda:{arch}",
        "cuda",
        arch,
        device,
        processors,
        warp_size=32,
        shared_bytes=shared_bytes,
        shared_of_processor=shared_bytes + 1024,
        shared_reserved=1024,
        registers=65_536,
        registers_per_thread=255,
        threads=threads,
        l2_bytes=l2 << 20,
        bandwidth=bandwidth,
        tensor_flops=flops,
        clock=clock,
        source=f"CUDA C++ Programming Guide 13, table of compute capabilities; {sheet}",
    )


_ALL = (
    # arch, device, SMs, shared memory of a program, threads of an SM, MiB of L2, bandwidth, tensor FLOP/s, clock, source
    _cuda("80", "A100 SXM 80 GB", 108, 166_912, 2048, 40, 2.04e12, 312e12, 1.41e9, "NVIDIA A100 data sheet"),
    _cuda(
        "86",
        "RTX A6000",
        84,
        101_376,
        1536,
        6,
        0.768e12,
        155e12,
        1.80e9,
        "NVIDIA GA102 whitepaper; A40 data sheet (149.7 TFLOPS at 1.74 GHz)",
    ),
    _cuda(
        "89",
        "L40S",
        142,
        101_376,
        1536,
        96,
        0.864e12,
        362e12,
        2.52e9,
        "NVIDIA L40S data sheet (362.05 TFLOPS dense); L2 of the L40: arXiv:2606.22588",
    ),
    _cuda("90", "H100 SXM 80 GB", 132, 232_448, 2048, 50, 3.35e12, 989e12, 1.755e9, "NVIDIA H100 data sheet"),
    _cuda("100", "B200", 148, 232_448, 2048, 126, 8.0e12, 2250e12, 1.85e9, "NVIDIA DGX B200 data sheet"),
    _cuda(
        "120",
        "GeForce RTX 5090",
        170,
        101_376,
        1536,
        96,
        1.792e12,
        209.5e12,
        2.41e9,
        "NVIDIA RTX Blackwell whitepaper (419 TFLOPS dense summing in fp16, half that in fp32)",
    ),
    Target(
        "hip:gfx942",
        "hip",
        "gfx942",
        "Instinct MI300X",
        processors=304,
        warp_size=64,
        shared_bytes=65_536,
        shared_of_processor=65_536,
        registers=131_072,
        registers_per_thread=512,
        threads=2048,
        l2_bytes=4 << 20,
        bandwidth=5.3e12,
        tensor_flops=1307e12,
        clock=2.1e9,
        source="AMD CDNA 3 ISA reference guide; ROCm documentation, MI300 microarchitecture (304 CUs, 4 MB of L2 a die); MI300X data sheet",
    ),
    Target("cpu", "cpu", "", "this machine's own CPU", source="nothing: the C++ backend measures"),
)
TARGETS: dict[str, Target] = {t.name: t for t in _ALL}


def find(name: str) -> Target:
    """Returns the target called ``name``; raises UnknownTarget."""
    if name not in TARGETS:
        raise UnknownTarget(f"no target is called {name!r}; there are {', '.join(TARGETS)}")
    return TARGETS[name]
