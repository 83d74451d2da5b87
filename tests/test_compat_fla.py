"""Drop-in functions for flash-linear-attention: its signatures, and what they compute against the recurrences its documentation states.

Where fla-core can be imported, signatures and numbers are also compared with the installed package's own (its naive torch references).
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lagen.compat import call, fla
from lagen.runtime.operator import ArgumentError

B, T, H, K, V = 2, 7, 2, 5, 3
TABLE = {name: f for name, f in vars(fla).items() if hasattr(f, "__signature__")}


@pytest.fixture(autouse=True, scope="module")
def torch_alone() -> Iterator[None]:
    """Runs the torch evaluation: calls are under test here, kernels elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(call, "load", partial(call.load, printed=()))
        call.LOADED.clear()
        yield
    call.LOADED.clear()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash(shape) + seed))


def inputs() -> dict[str, Tensor]:
    q, k, v = draw(B, T, H, K), draw(B, T, H, K, seed=1).abs(), draw(B, T, H, V)
    return {"q": q, "k": k, "v": v}


def reference(
    q: Tensor, k: Tensor, v: Tensor, gk: Any = 0.0, gv: Any = 0.0, scale: float | None = None, state: Any = None, u: Any = None
) -> tuple[Tensor, Tensor]:
    """S = e^gk (.) S (.) e^gv + k v, o = scale q S; with u the past is read, and u weighs the token's own write."""
    q, k, v = q.double(), k.double(), v.double()
    gk = torch.as_tensor(gk, dtype=torch.float64).expand(k.shape)
    gv = torch.as_tensor(gv, dtype=torch.float64).expand(v.shape)
    past = q.new_zeros(len(q), *k.shape[2:], v.shape[-1]) if state is None else state.double()
    rows = []
    for t in range(q.shape[1]):
        write = k[:, t, :, :, None] * v[:, t, :, None]
        after = gk[:, t, :, :, None].exp() * gv[:, t, :, None].exp() * past + write
        read = after if u is None else past + u.double()[:, :, None] * write
        rows.append((q[:, t, :, :, None] * read).sum(-2) * (K**-0.5 if scale is None else scale))
        past = after
    return torch.stack(rows, 1), past


def close(got: Any, wanted: Any) -> None:
    """Compares (o, state)."""
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=1e-4, atol=1e-5)


GK, GV, G = -draw(B, T, H, K, seed=5).abs(), -draw(B, T, H, V, seed=6).abs(), -draw(B, T, H).abs()
GAMMA = -torch.tensor([0.1, 0.3])
U = draw(H, K)
RETENTION = (1 - 2.0 ** (-5.0 - torch.arange(H))).log()[:, None]
LIGHTNING = (-(8 / H * (1 - 3 / 8)) * torch.arange(H))[:, None]

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("chunk_linear_attn", {"normalize": False}, {}),
    ("fused_chunk_linear_attn", {"normalize": False}, {}),
    ("fused_recurrent_linear_attn", {}, {}),
    ("chunk_simple_gla", {"g": G}, {"gk": G[..., None]}),
    ("chunk_simple_gla", {"g_gamma": GAMMA}, {"gk": GAMMA[:, None]}),
    ("chunk_simple_gla", {"g": G, "g_gamma": GAMMA}, {"gk": G[..., None] + GAMMA[:, None]}),
    ("chunk_simple_gla", {}, {}),
    ("fused_chunk_simple_gla", {"g": G}, {"gk": G[..., None]}),
    ("fused_recurrent_simple_gla", {"g": G}, {"gk": G[..., None]}),
    ("chunk_retention", {}, {"gk": RETENTION}),
    ("fused_chunk_retention", {}, {"gk": RETENTION}),
    ("fused_recurrent_retention", {}, {"gk": RETENTION}),
    ("chunk_lightning_attn", {"layer_idx": 3, "num_layers": 8}, {"gk": LIGHTNING}),
    ("fused_recurrent_lightning_attn", {"layer_idx": 3, "num_layers": 8}, {"gk": LIGHTNING}),
    ("chunk_gla", {"g": GK}, {"gk": GK}),
    ("fused_recurrent_gla", {"gk": GK}, {"gk": GK}),
    ("fused_recurrent_gla", {"gv": GV}, {"gv": GV}),
    ("fused_recurrent_gla", {"gk": GK, "gv": GV}, {"gk": GK, "gv": GV}),
    ("chunk_rwkv6", {"w": GK, "u": U}, {"gk": GK, "u": U}),
    ("fused_recurrent_rwkv6", {"w": GK, "u": U}, {"gk": GK, "u": U}),
]


def given(name: str, more: dict[str, Any]) -> dict[str, Any]:
    """Returns a function's tensors by its names for them."""
    names = inspect.signature(TABLE[name]).parameters
    return {n if n in names else "r": x for n, x in inputs().items()} | more


def case_id(case: Any) -> str | None:
    return case if isinstance(case, str) else "-".join(case) if isinstance(case, dict) else None


@pytest.mark.parametrize(("name", "more", "decays"), CASES, ids=case_id)
def test_a_function_computes_its_recurrence(name: str, more: dict[str, Any], decays: dict[str, Any]) -> None:
    run, tensors = TABLE[name], given(name, more)
    state = draw(B, H, K, V, seed=3)
    wanted = reference(**inputs(), **decays)
    o, final = run(**tensors)
    assert final is None
    close([o], wanted[:1])
    close(run(**tensors, scale=0.3, initial_state=state, output_final_state=True), reference(**inputs(), **decays, scale=0.3, state=state))
    leaves = [x.clone().requires_grad_() for x in (*tensors.values(), state) if isinstance(x, Tensor)]
    named = dict(zip([n for n, x in tensors.items() if isinstance(x, Tensor)], leaves, strict=False))
    o, final = run(**{**tensors, **named}, initial_state=leaves[-1], output_final_state=True)
    assert all(d.abs().max() > 0 for d in torch.autograd.grad(o.sum() + final.sum(), leaves))


def listed(argument: str) -> list[str]:
    """Lists the functions of CASES that take an argument."""
    return [n for n in dict.fromkeys(n for n, _, _ in CASES) if argument in inspect.signature(TABLE[n]).parameters]


def turned(x: Any) -> Any:
    return x.flip(1) if isinstance(x, Tensor) and x.ndim > 2 and x.shape[:2] == (B, T) else x


@pytest.mark.parametrize("name", listed("reverse"))
def test_reverse_runs_from_the_last_token(name: str) -> None:
    more = next(m for n, m, _ in CASES if n == name)
    state = draw(B, H, K, V)
    o, final = TABLE[name](**given(name, more), reverse=True, initial_state=state, output_final_state=True)
    flipped = {n: turned(x) for n, x in given(name, more).items()}
    wanted, last = TABLE[name](**flipped, initial_state=state, output_final_state=True)
    close((o, final), (wanted.flip(1), last))


@pytest.mark.parametrize("name", listed("state_v_first"))
def test_a_state_may_have_its_values_first(name: str) -> None:
    more = next(m for n, m, _ in CASES if n == name)
    state = draw(B, H, K, V)
    o, final = TABLE[name](**given(name, more), initial_state=state.mT.contiguous(), output_final_state=True, state_v_first=True)
    wanted, last = TABLE[name](**given(name, more), initial_state=state, output_final_state=True)
    close((o, final), (wanted, last.mT))
    assert final.is_contiguous()


def packed(x: Any) -> Any:
    return x.flatten(0, 1)[None] if isinstance(x, Tensor) and x.shape[:2] == (B, T) else x


@pytest.mark.parametrize(
    ("name", "reverse"),
    [
        ("chunk_simple_gla", False),
        ("chunk_retention", False),
        *((f"fused_recurrent_{n}", r) for n in ("gla", "rwkv6") for r in (False, True)),
    ],
)
def test_sequences_side_by_side_are_sequences_alone(name: str, reverse: bool) -> None:
    tensors = given(name, next(m for n, m, _ in CASES if n == name))
    named = {"initial_state": draw(B, H, K, V), "output_final_state": True} | ({"reverse": True} if reverse else {})
    o, final = TABLE[name](**{n: packed(x) for n, x in tensors.items()}, **named, cu_seqlens=torch.tensor([0, T, 2 * T]))
    wanted, last = TABLE[name](**tensors, **named)
    close((o, final), (packed(wanted), last))
    # an empty sequence keeps its state
    named["initial_state"] = named["initial_state"][:1].expand(3, H, K, V)
    empty = torch.tensor([0, 0, T, T], dtype=torch.int32)
    one = {n: x[:1] if isinstance(x, Tensor) and x.shape[:2] == (B, T) else x for n, x in tensors.items()}
    _, final = TABLE[name](**one, **named, cu_seqlens=empty)
    close([final[0], final[2]], [named["initial_state"][0]] * 2)


def test_normalised_sequences_side_by_side_each_carry_their_key_sum() -> None:
    tensors = inputs()
    o, (state, keys) = fla.chunk_linear_attn(
        **{n: packed(x) for n, x in tensors.items()}, output_final_state=True, cu_seqlens=torch.tensor([0, T, 2 * T])
    )
    wanted, (last, sums) = fla.chunk_linear_attn(**tensors, output_final_state=True)
    close((o, state, keys), (packed(wanted), last, sums))


def test_normalised_linear_attention_carries_its_key_sum() -> None:
    tensors = inputs()
    o, (state, keys) = fla.chunk_linear_attn(**tensors, output_final_state=True)
    plain, last = reference(**tensors)
    below = (tensors["q"] * K**-0.5 * tensors["k"].cumsum(1)).sum(-1, keepdim=True) + 1e-10
    close((o, state, keys), (plain / below, last, tensors["k"].sum(1, keepdim=True)))
    first, (none, between) = fla.fused_recurrent_linear_attn(*(x[:, :3] for x in tensors.values()), normalize=True)
    assert none is None
    held = fla.chunk_linear_attn(*(x[:, :3] for x in tensors.values()), output_final_state=True)[1]
    torch.testing.assert_close(between, held[1])
    rest, after = fla.fused_chunk_linear_attn(*(x[:, 3:] for x in tensors.values()), initial_state=held, output_final_state=True)
    close((torch.cat([first, rest], 1), *after), (o, state, keys))
    # a matrix alone is a state whose keys are none yet
    alone = fla.chunk_linear_attn(**tensors, initial_state=state)[0]
    close([alone], [reference(**tensors, state=state)[0] / below])


def test_taylor_and_square_maps() -> None:
    q, k, v = inputs().values()
    scores = torch.einsum("bthk,bshk->bhts", q, k) * K**-0.5
    for weigh, run in ((lambda s: 1 + s + s * s / 2, fla.parallel_based), (torch.square, fla.parallel_rebased)):
        weights = weigh(scores).tril()
        wanted = torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v)
        torch.testing.assert_close(run(q, k, v), wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fla.fused_chunk_based(q, k, v, scale=0.2), fla.parallel_based(q * 0.2 * K**0.5, k, v))


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda x: fla.chunk_simple_gla(**x, head_first=True), DeprecationWarning, "head_first has been removed"),
        (lambda x: fla.chunk_gla(**x), TypeError, "missing a required argument: 'g'"),
        (lambda x: fla.chunk_gla(*x.values(), GK, g=GK), TypeError, "multiple values for argument 'g'"),
        (lambda x: fla.chunk_gla(**x, g=GK, beta=GK), TypeError, r"chunk_gla\(\) got an unexpected keyword argument 'beta'"),
        (lambda x: fla.chunk_gla(**x, g=GK, chunk_size=64), TypeError, "unexpected keyword argument 'chunk_size'"),
        (lambda x: fla.chunk_gla(**x, g=GK[:, :3]), ArgumentError, r"gla: g is \[2, 3, 2, 5\]"),
        (lambda x: fla.chunk_gla(**x, g=GK, initial_state=draw(B, H, V, K)), ArgumentError, r"state S is \[2, 2, 3, 5\]"),
        (lambda x: fla.parallel_simple_gla(**x, output_attentions=True), NotImplementedError, "the attention matrix is never made"),
        (lambda x: fla.parallel_based(**x, use_norm=False), NotImplementedError, "without use_norm is not offered"),
        (lambda x: fla.fused_chunk_gla(**x), NotImplementedError, "`fused_chunk_gla` is deprecated"),
    ],
)
def test_what_does_not_fit_is_refused(run: Callable[[dict[str, Tensor]], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(inputs())


def test_hints_are_taken_and_the_old_name_of_a_layout_warns() -> None:
    x = inputs()
    wanted, last = fla.chunk_simple_gla(**x, g=G, output_final_state=True)
    assert torch.equal(fla.chunk_simple_gla(*x.values(), G, chunk_size=32)[0], wanted)
    with pytest.warns(DeprecationWarning, match="renamed to `state_v_first`"):
        _, final = fla.fused_recurrent_simple_gla(**x, g=G, output_final_state=True, transpose_state_layout=True)
    torch.testing.assert_close(final, last.mT)


def test_a_function_compiles_whole_once_its_operator_is_loaded() -> None:
    wanted = fla.chunk_gla(**inputs(), g=GK, output_final_state=True)
    compiled = torch.compile(lambda x, g: fla.chunk_gla(**x, g=g, output_final_state=True), fullgraph=True, backend="aot_eager")
    close(compiled(inputs(), GK), wanted)


# ---- against the installed package ----------------------------------------------------------------------------------------------


def installed(module: str) -> ModuleType:
    """Imports a module of fla-core, or skips with the reason."""
    found: ModuleType = pytest.importorskip(module, reason="fla-core is not importable here", exc_type=ImportError)
    return found


def shape(f: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]


@pytest.mark.parametrize("name", [*TABLE, "fused_chunk_gla", "fused_chunk_delta_rule"])
def test_signatures_are_those_of_the_installed_package(name: str) -> None:
    rooms = [
        installed(f"fla.ops{room}")
        for room in (
            "",
            ".rebased",
            ".gdn2",
            ".gated_oja_rule",
            ".gated_delta_product",
            ".rwkv7",
            ".hgrn",
            ".rwkv4",
            ".precond_gated_delta_rule",
        )
    ]
    theirs = next(getattr(room, name) for room in rooms if hasattr(room, name))
    assert shape(getattr(fla, name)) == shape(theirs)


def test_the_installed_layers_call_sites_are_accepted() -> None:
    room = Path(installed("fla").__file__ or "").parent
    refused, accepted = [], 0
    for path in sorted([*room.glob("layers/*.py"), *room.glob("models/*/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in TABLE:
                continue
            names = [k.arg for k in node.keywords if k.arg is not None]
            try:
                inspect.signature(TABLE[node.func.id]).bind(*node.args, **dict.fromkeys(names))
            except TypeError as error:
                refused.append(f"{path.name}:{node.lineno}: {node.func.id}: {error}")
            unread = set(names) - inspect.signature(TABLE[node.func.id]).parameters.keys() - call.HINTS - call.SWITCHES
            refused += [f"{path.name}:{node.lineno}: {node.func.id}: {name} goes unread" for name in sorted(unread)]
            accepted += 1
    assert not refused
    assert accepted > 20


NAIVE: list[tuple[str, str, str, dict[str, Any]]] = [
    ("linear_attn.naive", "naive_recurrent_linear_attn", "chunk_linear_attn", {"normalize": True}),
    ("linear_attn.naive", "naive_recurrent_linear_attn", "fused_recurrent_linear_attn", {}),
    ("simple_gla.naive", "naive_recurrent_simple_gla", "chunk_simple_gla", {"g": G}),
    ("gla.naive", "naive_recurrent_gla", "fused_recurrent_gla", {"gk": GK}),
    ("rwkv6.recurrent_naive", "naive_recurrent_rwkv6", "chunk_rwkv6", {"w": GK, "u": U}),
]


@pytest.mark.parametrize(("module", "theirs", "name", "more"), NAIVE, ids=[n for _, n, _, _ in NAIVE])
def test_numbers_are_those_of_the_installed_references(module: str, theirs: str, name: str, more: dict[str, Any]) -> None:
    naive = getattr(installed(f"fla.ops.{module}"), theirs)
    tensors = inputs() | more
    if "rwkv6" in name:  # that reference alone has heads in front of time, and calls r by q
        heads = {n: x.transpose(1, 2) if n != "u" else x for n, x in tensors.items()}
        o, state = naive(**heads, output_final_state=True)
        wanted: Any = (o.transpose(1, 2), state)
    else:
        wanted = naive(**tensors, output_final_state=True)
    o, state = TABLE[name](**given(name, more), output_final_state=True)
    close([o, *call.as_tuple(state)], [wanted[0], *call.as_tuple(wanted[1])])
