"""Context parallel: two and four gloo processes on one machine against one process, forward and every gradient."""

from __future__ import annotations

import socket
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import lagen
from lagen import data
from lagen.ir.roles import bounds
from lagen.nn import LinearAttention
from lagen.nn.start import Bound
from lagen.parallel import context_parallel
from lagen.runtime.operator import ArgumentError, Operator
from lagen.runtime.signature import measure
from lagen.spec import read, read_text

B, H, SIZES = 2, 2, {"HV": 2, "K": 4, "V": 3, "M": 3, "D": 5, "E": 4, "N": 3}
LENGTHS = {2: (9, 4), 4: (5, 0, 7, 1)}
STAGED = """
name: staged
doc: what one state reads is written into another, through a function
inputs: {q: [H, K], k: [H, K], v: [H, V], w: [H, M], g: [H]}
assume:
  - g <= 0
recurrence:
  A: exp(g) * A[t-1] + outer(k, v)
  B: exp(g) * B[t-1] + outer(tanh(q @ A[t]), w)
  o: v @ B[t]
"""
VALUED = """
name: valued
doc: corrected on the keys and decayed on the values, so that what tokens do differs by value channel
inputs: {q: [H, K], k: [H, K], v: [H, V], c: [H, V], beta: [H]}
assume:
  - c <= 0
recurrence:
  S: exp(c) * S[t-1] + beta * outer(k, v - k @ (exp(c) * S[t-1]))
  o: scale * (q @ S[t])
"""
SPECS = [path.stem for path in data.specs() if read(path).causal]
CHECKED = (*SPECS, "fla/gla_gates", VALUED, STAGED)
PRINTED = ("linear_attention", "retnet", "gla", "mamba2", "gated_deltanet", "rwkv7", "gsa", "mlstm", "rwkv4", "mamba1")
"""One spec of each family, which goes through C++ too."""


def operator(name: str) -> Operator:
    if "\n" in name:
        return lagen.load(read_text(name), printed=())
    folder, _, stem = name.rpartition("/")
    return lagen.load(read(data.folder("specs") / folder / f"{stem}.yaml"), printed=("cpp",) if name in PRINTED else ())


def tensors(op: Operator, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Draws inputs and params inside their bounds, and states before the first token, all in float64 and the same everywhere."""
    generator, variant = torch.Generator().manual_seed(0), read_text(op.spec.source)
    sizes = {"B": B, "T": tokens, "H": H, **SIZES}
    for dim, formula in op.spec.sizes:
        sizes[dim] = measure(formula, sizes)

    def draw(*shape: str) -> Tensor:
        return torch.randn([sizes[d] for d in shape], dtype=torch.float64, generator=generator)

    given = [Bound(*bounds(variant, a.name)).apply(draw(*a.shape("B", "T"))) for a in op.spec.inputs]
    given += [Bound(*bounds(variant, a.name)).apply(draw(*a.shape())) for a in op.spec.params]
    return given, [draw(*s.shape("B")).abs() + 1.0 for s in op.spec.states]  # a normaliser wants a positive state


def check(op: Operator, rank: int, group: dist.ProcessGroup, ranks: int, carried: bool, dtype: torch.dtype = torch.float64) -> None:
    """Compares a split run with the whole one: outputs, the last state, and the gradients of inputs, params and the state before.

    On the CPU float64 goes through torch, float32 through C++ where it was printed.
    """
    lengths = LENGTHS[ranks]
    edges = [0, *accumulate(lengths)]
    mine = slice(edges[rank], edges[rank + 1])
    whole, before = ([x.to(dtype) for x in drawn] for drawn in tensors(op, edges[-1]))
    inputs = len(op.spec.inputs)
    leaves = [x.clone().requires_grad_() for x in (*whole, *before)]
    state = tuple(leaves[len(whole) :]) if carried else None
    o, finals = op(*leaves[: len(whole)], initial_state=state, output_final_state=True)
    finals = finals if isinstance(finals, tuple) else (finals,)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(o.shape, dtype=o.dtype, generator=generator)
    ((weights * o).sum() + sum((s * s).sum() for s in finals)).backward()

    own = [x[:, mine].clone().requires_grad_() if i < inputs else x.clone().requires_grad_() for i, x in enumerate(whole)]
    own_state = tuple(x.clone().requires_grad_() for x in before) if carried else None
    got, ends = context_parallel(op, *own, group=group, initial_state=own_state, output_final_state=True)
    ends = ends if isinstance(ends, tuple) else (ends,)
    off = 1e-9 if dtype == torch.float64 else 1e-4
    close = {"rtol": off, "atol": off, "msg": lambda m: f"{op.spec.name}, {ranks} ranks, rank {rank}: {m}"}
    torch.testing.assert_close(got, o[:, mine], **close)
    share = (weights[:, mine] * got).sum()
    if rank == ranks - 1:
        for end, final in zip(ends, finals, strict=True):
            torch.testing.assert_close(end, final, **close)
        share = share + sum((s * s).sum() for s in ends)
    share.backward()
    for i, (x, leaf) in enumerate(zip(own, leaves, strict=False)):
        assert leaf.grad is not None
        assert x.grad is not None
        if i < inputs:
            torch.testing.assert_close(x.grad, leaf.grad[:, mine], **close)
        else:
            dist.all_reduce(x.grad, group=group)
            torch.testing.assert_close(x.grad, leaf.grad, **close)
    if own_state is not None and rank == 0:
        for x, leaf in zip(own_state, leaves[len(whole) :], strict=True):
            torch.testing.assert_close(x.grad, leaf.grad, **close)


def check_layer(name: str, rank: int) -> None:
    """Compares a layer on four stretches with the layer on the whole, its convolutions reaching over more than one of them."""
    torch.manual_seed(0)
    mixer = LinearAttention(operator(name), 8, 2, convolution=4, length=16).double()
    lengths = (3, 1, 0, 5)
    edges = [0, *accumulate(lengths)]
    mine = slice(edges[rank], edges[rank + 1])
    whole = torch.randn(B, edges[-1], 8, dtype=torch.float64, requires_grad=True)
    own = whole.detach()[:, mine].clone().requires_grad_()
    wanted = mixer(whole)
    weights = torch.randn(wanted.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((weights * wanted).sum(), [whole, *mixer.parameters()])
    got = mixer(own, group=dist.group.WORLD)
    torch.testing.assert_close(got, wanted[:, mine])
    d_own, *shares = torch.autograd.grad((weights[:, mine] * got).sum(), [own, *mixer.parameters()], allow_unused=True)
    torch.testing.assert_close(d_own, gradients[0][:, mine])
    for share, gradient in zip(shares, gradients[1:], strict=True):
        share = torch.zeros_like(gradient) if share is None else share  # a rank without tokens convolves none
        dist.all_reduce(share)
        torch.testing.assert_close(share, gradient)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def work(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    pair = dist.new_group([0, 1])
    for i, name in enumerate(CHECKED):
        op = operator(name)
        for j, dtype in enumerate((torch.float64, torch.float32)[: 1 + (name in PRINTED)]):
            check(op, rank, dist.group.WORLD, 4, carried=(i + j) % 2 == 0, dtype=dtype)
            if rank < 2:
                check(op, rank, pair, 2, carried=(i + j) % 2 == 1, dtype=dtype)
    for name in ("gla", "cosformer"):
        check_layer(name, rank)
    dist.destroy_process_group()


def test_ranks_agree_with_one_process() -> None:
    for name in CHECKED:
        operator(name)  # in the cache before four ask for it
    mp.spawn(work, (free_port(),), nprocs=4)


@pytest.fixture
def alone() -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_rank_is_the_operator(alone: None) -> None:
    op = operator("gla")
    given, _ = tensors(op, 5)
    assert torch.equal(context_parallel(op, *given), op(*given))


def test_what_is_not_causal_is_refused(alone: None) -> None:
    op = operator("efficient_attention")
    x = torch.randn(1, 3, 1, 4)
    with pytest.raises(ArgumentError, match="efficient_attention is not causal: a sum over all tokens is no state"):
        context_parallel(op, x, x, x)
