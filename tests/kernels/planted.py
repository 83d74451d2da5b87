"""Kernels with known needs and known faults, for the tests of the compiler and of the sanitizer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

HALF: tl.constexpr = tl.constexpr(0.5)


@triton.jit
def halve(b_x):
    return b_x * HALF


@triton.jit
def add_kernel(a, b, o, n, BT: tl.constexpr):
    i_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = i_t < n
    tl.store(o + i_t, halve(tl.load(a + i_t, mask=m_t)) + tl.load(b + i_t, mask=m_t), mask=m_t)


@triton.jit
def product_kernel(a, o, stride, C: tl.constexpr):
    i_c = tl.arange(0, C)
    b_a = tl.load(a + i_c[:, None] * stride + i_c[None, :])
    b_p = tl.dot(b_a, tl.trans(b_a))
    b_q = tl.dot(b_p, tl.exp(b_p)) + b_p
    tl.store(o + i_c[:, None] * stride + i_c[None, :], b_q.to(o.dtype.element_ty))


@triton.jit
def unmasked_load_kernel(a, o, n, BT: tl.constexpr):
    i_t = tl.arange(0, BT)
    b_a = tl.load(a + i_t)  # planted: no mask
    tl.store(o + i_t, b_a, mask=i_t < n)


@triton.jit
def shifted_store_kernel(a, o, n, BT: tl.constexpr):
    i_t = tl.arange(0, BT)
    m_t = i_t < n
    tl.store(o + i_t + 1, tl.load(a + i_t, mask=m_t), mask=m_t)  # planted: off by one


@triton.jit
def shared_sum_kernel(a, o, BT: tl.constexpr):
    i_t = tl.program_id(0) * BT + tl.arange(0, BT)
    b_o = tl.load(o)
    tl.store(o, b_o + tl.sum(tl.load(a + i_t)))  # planted: every program writes one number


@triton.jit
def neighbour_kernel(a, BT: tl.constexpr):
    i_p = tl.program_id(0)
    i_t = tl.arange(0, BT)
    b_n = tl.load(a + (i_p + 1) * BT + i_t, mask=i_t < (1 - i_p) * BT)  # planted: reads what the next program writes
    tl.store(a + i_p * BT + i_t, b_n)


@triton.jit
def atomic_sum_kernel(a, o, BT: tl.constexpr):
    i_t = tl.program_id(0) * BT + tl.arange(0, BT)
    tl.atomic_add(o, tl.sum(tl.load(a + i_t)))


@triton.jit
def half_written_kernel(a, o, n, BT: tl.constexpr):
    i_t = tl.arange(0, BT)
    m_t = i_t < n - 1
    tl.store(o + i_t, tl.load(a + i_t, mask=m_t), mask=m_t)  # planted: leaves the last row as it was


def add(a: torch.Tensor, b: torch.Tensor, BT: int = 64) -> torch.Tensor:
    """Launches add_kernel; touches only shapes, so it runs on meta tensors too."""
    o = torch.empty_like(a)
    add_kernel[(triton.cdiv(a.numel(), BT),)](a, b, o, a.numel(), BT=BT, num_warps=2)
    return o


def product(a: torch.Tensor) -> torch.Tensor:
    """Launches product_kernel on a square matrix."""
    o = torch.empty_like(a)
    product_kernel[lambda bound: (1, 1)](a, o, a.stride(0), C=a.shape[0], num_warps=4, num_stages=2)
    return o


@triton.jit
def bfloat16_kernel(a, b, o, p, C: tl.constexpr):
    i_c = tl.arange(0, C)
    i_cc = i_c[:, None] * C + i_c[None, :]
    b_a, b_b = tl.load(a + i_cc), tl.load(b + i_cc)
    tl.store(o + i_cc, b_a * b_b + tl.where(b_a < b_b, b_a, -b_b))
    b_l = (i_c[:, None] >= i_c[None, :]).to(tl.bfloat16)
    tl.store(p + i_cc, tl.dot(b_l, b_b) + i_c[:, None].to(tl.bfloat16) - b_a)


@triton.jit
def _affine(a, s, b, w):
    return a * b, s * b + w


@triton.jit
def scan_kernel(a, b, o, C: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    i_c = tl.arange(0, C)
    i_cc = i_c[:, None] * C + i_c[None, :]
    tl.store(o + i_cc, tl.associative_scan((tl.load(a + i_cc), tl.load(b + i_cc)), AXIS, _affine, reverse=REVERSE)[1])


@triton.jit
def scan_numbers_kernel(a, b, o, C: tl.constexpr):
    i_c = tl.arange(0, C)
    tl.store(o + i_c, tl.associative_scan((tl.load(a + i_c), tl.load(b + i_c)), 0, _affine)[1])
