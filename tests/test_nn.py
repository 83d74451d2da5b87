"""Layers: every shipped spec as a token mixer, in chunks and token by token, trained, saved, halved and generating."""

from __future__ import annotations

import copy
import math
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lagen
from lagen import data
from lagen.nn import Cache, LinearAttention, ShortConvolution
from lagen.nn.feed import Feed
from lagen.runtime.build import build
from lagen.runtime.operator import ArgumentError, Operator
from lagen.spec import read, read_text

SPECS = [path.stem for path in data.specs()]
DIM, HEADS, B, T = 16, 2, 2, 13


@cache
def operator(name: str) -> Operator:
    """The torch evaluation alone: layers are under test here, kernels elsewhere."""
    return lagen.load(name if "\n" not in name else read_text(name), printed=())


def heads_of(op: Operator) -> int:
    return HEADS if any(a.head for a in op.spec.inputs) else 1


def layer(name: str, convolution: int | None = None, loud: float = 4.0, **named: object) -> LinearAttention:
    """A layer whose projections are loud enough that what they carry is seen in the output."""
    torch.manual_seed(0)
    op = operator(name)
    if convolution is None:
        convolution = 3 if op.spec.causal else 0
    made = LinearAttention(op, DIM, heads_of(op), convolution=convolution, **named)
    with torch.no_grad():
        for feed in made.feeds.values():
            feed.linear.weight *= loud
    return made


def hidden(tokens: int = T, batch: int = B) -> Tensor:
    return torch.randn(batch, tokens, DIM, generator=torch.Generator().manual_seed(1))


# ---- every spec -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_gradients_reach_every_parameter_and_the_hidden_vectors(name: str) -> None:
    mixer, x = layer(name), hidden().requires_grad_()
    mixer(x).square().sum().backward()
    for what, p in (("x", x), *mixer.named_parameters()):
        assert p.grad is not None, what
        assert p.grad.isfinite().all(), what
        assert p.grad.abs().max() > 0, what


@pytest.mark.parametrize("name", [s for s in SPECS if s != "efficient_attention"])
def test_chunks_and_steps_agree_with_a_cache_between_them(name: str) -> None:
    mixer, x = layer(name, length=T), hidden()
    with torch.no_grad():
        wanted = mixer(x)
        held = Cache()
        followed = torch.cat([mixer(x[:, :6], held), mixer(x[:, 6:9], held), *(mixer(x[:, t : t + 1], held) for t in range(9, T))], 1)
        assert held.seen == T
        held = Cache()
        stepped = torch.stack([mixer.step(x[:, t], held) for t in range(T)], 1)
    torch.testing.assert_close(followed, wanted, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(stepped, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", SPECS)
def test_bfloat16_is_near_float32_and_a_state_dict_makes_the_same_layer(name: str) -> None:
    mixer, x = layer(name, loud=2.0, length=T), hidden()
    with torch.no_grad():
        wanted = mixer(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = mixer(x)
        torch.manual_seed(7)
        other = LinearAttention(operator(name), DIM, heads_of(operator(name)), convolution=3 if operator(name).spec.causal else 0, length=T)
        assert not torch.equal(other(x), wanted)
        other.load_state_dict(mixer.state_dict())
        assert torch.equal(other(x), wanted)
        half = other.bfloat16()(x.bfloat16())
    assert half.dtype == mixed.dtype == torch.bfloat16
    for found in (mixed, half):
        assert (found.float() - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "cosformer"])
def test_sequences_side_by_side_are_sequences_alone(name: str) -> None:
    mixer, x = layer(name, length=T), hidden(T, 1)
    edges = (0, 4, 4, 5, T)
    packed = Cache()
    with torch.no_grad():
        got = mixer(x, packed, cu_seqlens=torch.tensor(edges))
        for n, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
            own = Cache()
            torch.testing.assert_close(got[:, start:end], mixer(x[:, start:end], own))
            held = packed[0].states
            assert held is not None
            for together, apart in zip(held, own[0].states or (), strict=True):
                torch.testing.assert_close(together[n : n + 1], apart)
            for what, window in own[0].windows.items():
                torch.testing.assert_close(packed[0].windows[what][n : n + 1], window)
        if name == "cosformer":
            with pytest.raises(ValueError, match="cosformer asks for positions: sequences side by side cannot follow on a cache"):
                mixer(x, packed, cu_seqlens=torch.tensor(edges))
            return
        again = mixer(x, packed, cu_seqlens=torch.tensor(edges))
    whole = Cache()
    with torch.no_grad():
        mixer(x[:, :4], whole)
        torch.testing.assert_close(again[:, :4], mixer(x[:, :4], whole))


# ---- models ---------------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A causal language model, as small as one can be."""

    def __init__(self, names: tuple[str, ...], words: int = 11) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(words, DIM)
        self.mixers = nn.ModuleList(LinearAttention(operator(n), DIM, HEADS, convolution=3, layer=i) for i, n in enumerate(names))
        self.head = nn.Linear(DIM, words)

    def forward(self, tokens: Tensor, past: Cache | None = None) -> Tensor:
        x = self.embed(tokens)
        for mixer in self.mixers:
            x = x + mixer(functional.rms_norm(x, (DIM,)), past)
        return self.head(x)

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, past: Cache | None) -> Tensor:
        """Continues greedily, as transformers' loop does: only what the cache has not seen goes in."""
        for _ in range(count):
            logits = self(tokens if past is None else tokens[:, past.seen :], past)
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        return tokens


def test_generating_with_a_cache_equals_recomputing() -> None:
    model = Model(("gla", "mamba2", "linear_attention"))
    prompt = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0))
    past = Cache()
    got = model.generate(prompt, 20, past)
    assert torch.equal(got, model.generate(prompt, 20, None))
    assert past.seen == 24
    assert len(got.unique()) > 3
    torch.testing.assert_close(model(got[:, -1:], past), model(got)[:, -1:])


def test_a_cache_can_be_reordered_copied_and_reset() -> None:
    model = Model(("gla", "rwkv6"))
    prompt = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0))
    past, rows = Cache(), torch.tensor([2, 0])
    with torch.no_grad():
        model(prompt, past)
        fork = past.copy()
        past.reorder(rows)
        following = torch.tensor([[1], [4]])
        torch.testing.assert_close(model(following, past), model(torch.cat([prompt[rows], following], 1))[:, -1:])
        torch.testing.assert_close(
            model(following.expand(2, 1)[:1].expand(3, 1), fork)[:, 0], model(functional.pad(prompt, (0, 1), value=1))[:, -1]
        )
    fork.reset()
    assert fork.seen == 0


def test_truncated_backpropagation_stops_where_the_cache_was_detached() -> None:
    mixer, x = layer("gla"), hidden().requires_grad_()
    for cut in (False, True):
        past = Cache()
        mixer(x[:, :6], past)
        if cut:
            past.detach()
        (d,) = torch.autograd.grad(mixer(x[:, 6:], past).sum(), x)
        assert bool(d[:, :6].abs().max() == 0) is cut
        assert d[:, 6:].abs().max() > 0
    past = Cache()
    whole = torch.cat([mixer(x[:, :6], past), mixer(x[:, 6:], past)], 1)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (whole, mixer(x))), rtol=1e-3, atol=1e-5)


def test_training_lowers_the_loss() -> None:
    model = Model(("gla", "simple_gla"))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(40):
        words = torch.randint(11, (16, 2), generator=generator)  # a sequence has two words: which, its past alone can tell
        tokens = words.gather(1, torch.randint(2, (16, 12), generator=generator))
        loss = functional.cross_entropy(model(tokens)[:, 4:-1].flatten(0, 1), tokens[:, 5:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_a_layer_is_copied_and_compiled_whole() -> None:
    mixer, x = layer("gla"), hidden()
    compiled = torch.compile(copy.deepcopy(mixer), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mixer(x))


def test_a_built_package_serves_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build([read(data.spec("gla"))], tmp_path / "layer_ops", printed=())
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    mixer = LinearAttention(import_module("layer_ops").gla, DIM, HEADS)
    torch.manual_seed(0)
    torch.testing.assert_close(mixer(hidden()), LinearAttention(operator("gla"), DIM, HEADS)(hidden()))


# ---- what a spec asks for -------------------------------------------------------------------------------------------------------

DELTA_LIKE = """
name: delta_like
inputs: {k: [H, K], v: [H, V], beta: [H], pos: []}
assume:
  - dot(k, k) <= 1
  - beta >= 0
  - beta <= 2
  - pos >= 0
recurrence:
  S: S[t-1] + beta * outer(k, v)
  o: (k @ S[t]) * cos(pos)
"""
HEADLESS = """
name: headless
inputs: {q: [D], x: [D], f: [D]}
recurrence:
  h: sigmoid(f) * h[t-1] + x
  o: q @ h[t]
"""


def test_inputs_keep_to_what_the_spec_assumes() -> None:
    for name in (DELTA_LIKE, *(s for s in SPECS if operator(s).assumptions)):
        mixer = layer(name, loud=20.0, length=T)
        tensors = mixer._tensors(hidden(), None, None)
        mixer.operator(*tensors, check=True)
    k, _, beta, pos = layer(DELTA_LIKE, loud=20.0)._tensors(hidden(), None, None)
    torch.testing.assert_close(k.square().sum(-1), torch.ones(B, T, HEADS))
    assert beta.max() > 1
    assert torch.equal(pos, torch.arange(float(T)).expand(B, T))


def test_bounded_params_stay_inside_however_far_they_are_trained() -> None:
    for name, param in (("hgrn2", "lower_bound"), ("retnet", "g_gamma"), ("lightning", "s")):
        mixer = layer(name)
        for far in (-1e4, 1e4):
            with torch.no_grad():
                mixer.params[param].fill_(far)
            mixer.operator(*mixer._tensors(hidden(), None, None), check=True)


def test_params_start_as_the_papers_have_it() -> None:
    mamba = LinearAttention(operator("mamba2"), 64, 8)
    assert (mamba.param("A_log").exp() >= 1).all()
    assert (mamba.param("A_log").exp() <= 16).all()
    steps = functional.softplus(mamba.param("dt_bias"))
    assert (steps > 0.999e-3).all()
    assert (steps < 0.1001).all()
    assert torch.equal(mamba.param("D"), torch.ones(8))
    torch.testing.assert_close(
        LinearAttention(operator("retnet"), 64, 4).param("g_gamma").exp(), 1 - 2.0 ** (-5 - torch.arange(4.0)), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(LinearAttention(operator("lightning"), 64, 8).param("s"), 2.0 ** -torch.arange(1.0, 9.0))
    rebased = LinearAttention(operator("rebased"), 64, 8)
    assert torch.equal(rebased.param("gamma_q"), torch.ones(8))
    assert torch.equal(rebased.param("beta_k"), torch.zeros(8))
    directions = LinearAttention(operator("performer"), 64, 8, M=8).param("W")
    cosines = functional.normalize(directions, dim=0).mT @ functional.normalize(directions, dim=0)
    torch.testing.assert_close(cosines, torch.eye(8), rtol=0, atol=1e-5)


def test_own_modules_and_starts_take_the_place_of_the_derived_ones() -> None:
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((*x.shape[:-1], HEADS, DIM // HEADS), -0.1)

    mixer = LinearAttention(operator("gla"), DIM, HEADS, inputs={"g": Slow()})
    assert torch.equal(mixer._tensors(hidden(), None, None)[3], torch.full((B, T, HEADS, 8), -0.1))
    assert "g" not in {n.split(".")[1] for n, _ in mixer.named_parameters() if n.startswith("feeds")}
    lightning = LinearAttention(operator("lightning"), DIM, HEADS, init={"s": lambda like: torch.full_like(like, 0.25)})
    torch.testing.assert_close(lightning.param("s"), torch.full((HEADS,), 0.25))


def test_sizes_are_given_by_name_and_default_to_the_width_over_the_heads() -> None:
    grouped = LinearAttention(operator("simple_gla"), 16, 2, HV=4, K=5)
    assert {d: grouped.sizes[d] for d in ("H", "HV", "K", "V")} == {"H": 2, "HV": 4, "K": 5, "V": 4}
    assert grouped(hidden()).shape == (B, T, 16)
    assert LinearAttention(operator("performer"), 16, 2, M=6).param("W").shape == (8, 6)
    headless = LinearAttention(operator(HEADLESS), 16, convolution=2)
    assert headless.sizes["D"] == 16
    assert headless(hidden()).shape == (B, T, 16)


BAD = [
    ("gla", {"N": 4}, r"gla has no dim 'N' to give a size; it has K, V"),
    ("gla", {"H": 4}, r"gla has no dim 'H'"),
    ("gla", {"heads": 3}, r"gla: dim = 16 is not a multiple of 3 heads; give K= a size"),
    ("simple_gla", {"HV": 3}, r"HV = 3 wants to be a multiple of heads = 2"),
    ("gla", {"inputs": {"beta": nn.Identity()}}, r"inputs names 'beta', which gla does not have; it has q, k, v, g"),
    ("gla", {"init": {"A_log": torch.ones_like}}, r"init names 'A_log', which gla does not have; it has none"),
    ("efficient_attention", {"convolution": 4}, r"efficient_attention is not causal, and the short convolution is"),
    (HEADLESS, {}, r"headless has no heads; leave heads at 1, not 2"),
]


@pytest.mark.parametrize(("name", "named", "message"), BAD, ids=[m[:40] for *_, m in BAD])
def test_what_the_spec_does_not_have_is_refused(name: str, named: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearAttention(operator(name), DIM, **{"heads": 2, **named})


def test_without_a_decode_step_a_cache_is_refused() -> None:
    mixer = layer("efficient_attention")
    with pytest.raises(ValueError, match="efficient_attention is not causal: it has no decode step, and nothing for a cache to hold"):
        mixer(hidden(), Cache())
    with pytest.raises(ValueError, match="no decode step"):
        mixer.step(hidden()[:, 0], Cache())


def test_a_step_drops_no_gradient() -> None:
    with pytest.raises(ArgumentError, match="step has no gradient"):
        layer("gla").step(hidden()[:, 0], Cache())


# ---- the convolution ------------------------------------------------------------------------------------------------------------


def test_the_convolution_is_causal_and_its_window_carries_on() -> None:
    convolution, x = ShortConvolution(5, 4), torch.randn(2, 9, 5)
    whole, window = convolution(x)
    torch.testing.assert_close(window, x[:, -3:])
    changed = x.clone()
    changed[:, 6:] += 1.0
    torch.testing.assert_close(convolution(changed)[0][:, :6], whole[:, :6])
    first, held = convolution(x[:, :2])
    second, held = convolution(x[:, 2:], held)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    held = torch.zeros(2, 3, 5)
    with torch.no_grad():
        torch.testing.assert_close(torch.stack([convolution.step(x[:, t], held) for t in range(9)], 1), whole)
    torch.testing.assert_close(held, window)


def test_sequences_side_by_side_do_not_see_each_other() -> None:
    convolution, x = ShortConvolution(5, 4), torch.randn(1, 12, 5)
    edges = (0, 1, 1, 7, 12)
    windows = torch.randn(4, 3, 5)
    got, held = convolution(x, windows, torch.tensor(edges, dtype=torch.int32))
    for n, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        wanted, window = convolution(x[:, start:end], windows[n : n + 1])
        torch.testing.assert_close(got[:, start:end], wanted)
        torch.testing.assert_close(held[n : n + 1], window)


def test_a_gate_starts_gentle_and_in_float32() -> None:
    feed = layer("gla", loud=1.0).feeds["g"]
    assert isinstance(feed, Feed)
    g = feed(torch.zeros(1, DIM).bfloat16().float())
    torch.testing.assert_close(g, torch.full_like(g, math.log(0.5) / 16))
    assert feed.bfloat16()(hidden().bfloat16()).dtype == torch.float32
