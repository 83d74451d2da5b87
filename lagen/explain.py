"""Explains what the compiler makes of a spec: the canonical recurrence, why its decays are safe, its chunk form, its gradients, its plan.

The texts are for people; STAGES lists what can be asked for. Nothing is compiled and no device is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lagen.emit.mathematics import Mathematics
from lagen.ir import expr as E
from lagen.ir.chunk import Carry
from lagen.ir.expr import Expr
from lagen.ir.recurrence import Adjoint, Recurrence, State
from lagen.ir.variant import Tensor, Variant
from lagen.passes.canonicalise import canonicalise
from lagen.passes.chunk import carry_of, lower_readout
from lagen.passes.differentiate import differentiate
from lagen.passes.digest import digest
from lagen.spec.read import read
from lagen.targets.tuned import find as find_tuned


@dataclass(frozen=True)
class Made:
    """What the passes made of a variant, each when it is first asked for."""

    variant: Variant

    @cached_property
    def recurrence(self) -> Recurrence:
        """Returns the canonical recurrence; raises Refused."""
        return canonicalise(self.variant)

    @cached_property
    def adjoint(self) -> Adjoint:
        """Returns the backward."""
        return differentiate(self.recurrence)


def explain(subject: Variant | str | Path, stage: str = "all") -> str:
    """This function returns the stages of a variant, or of the spec file at a path, as text; "all" is all but variant, source and tuned.

    Raises SpecErrors, and ValueError for a stage that is not one of STAGES.
    """
    variant = subject if isinstance(subject, Variant) else read(subject)
    if stage != "all" and stage not in STAGES:
        raise ValueError(f"no stage named {stage!r}; there are {', '.join(STAGES)} and all")
    made = Made(variant)
    chosen = [s for s in STAGES if s not in ("variant", "source", "tuned")] if stage == "all" else [stage]
    parts = [STAGES[s](made) for s in chosen]
    return "\n\n".join(([_title(made)] if stage == "all" else []) + parts)


def family(recurrence: Recurrence) -> str:
    """This function returns the family of a recurrence in words, as in "per-key decay, exclusive read"."""
    main = next((s for s in recurrence.states if len(s.dims) == 2), next(s for s in recurrence.states if not s.peak))
    reads = [r for _, e in recurrence.outputs for r in E.reads(e, "readout")]
    of_main = [r for r in reads if r.name == main.name]
    words = [_decay_words(main, of_main[0].attr("dim") if of_main else "")] if main.causal else ["not causal"]
    if any(s.peak for s in recurrence.states):
        words.append("peak")
    if any(E.reads(x, "readout") for s in recurrence.states if not s.peak for w in s.writes for x in (w.row, w.col)) or any(
        E.reads(r.args[0], "readout") for r in reads
    ):
        words.append("stages")
    if len(main.dims) < 2:
        words.append("vector state" if main.dims else "scalar state")
    if any(len(s.dims) < 2 for s in recurrence.states) and len(main.dims) == 2:
        words.append("normaliser")
    if of_main and all(r.attr("at") == "previous" for r in of_main):
        words.append("exclusive read")
    elif any(r.attr("at") == "decayed" for r in of_main):
        words.append("read before the write")
    plain = len(main.writes) - len(main.solves)
    if main.solves:
        words.append(_correction_words(main, of_main[0].attr("dim") if of_main else ""))
    if plain > 1:
        words.append(f"{plain} writes a token")
    return ", ".join(words)


def _correction_words(state: State, contracted: str) -> str:
    """Names the low-rank part of a transition: how many corrections, whether they replace what they read, which past they read."""
    n = len(state.solves)
    words = "delta rule" if all(u.base != E.ZERO for u in state.solves) else "low-rank transition"
    words = words if n == 1 else f"{words}, {n} corrections a token"
    if any(r.attr("dim") != contracted for u in state.solves for r in u.reads):
        words = f"mirrored {words}"
    undecayed = state.decay and any(r.attr("at") == "previous" for u in state.solves for r in u.reads)
    return f"{words} on the undecayed past" if undecayed else words


def _decay_words(state: State, contracted: str) -> str:
    if not state.decay:
        return "no decay"
    if state.dense:
        return "dense decay"
    if len(state.dims) == 1:
        return "per-channel decay" if state.decay[0].dims else "scalar decay"
    words = []
    for g in state.decay:
        if g.dims:
            words.append("per-key" if g.dims[0] == contracted else "per-value")
        else:
            words.append("scalar" if g.token else "head-constant")
    return " and ".join(words) + " decay"


# ---- stages ---------------------------------------------------------------------------------------------------------------------


def _title(made: Made) -> str:
    v, r = made.variant, made.recurrence
    arguments = ", ".join(t.name for t in v.inputs + v.params)
    lines = [f"{v.name}: {family(r)}", f"  {v.doc}"] if v.doc else [f"{v.name}: {family(r)}"]
    lines.append(f"  {v.name}({arguments})    algebra {digest(r)[:12]}")
    lines.append("  " + "   ".join(_declared(t) for t in v.inputs + v.params))
    return "\n".join(lines)


def _declared(t: Tensor) -> str:
    return f"{t.name} [{', '.join(t.shape)}]"


def _variant(made: Made) -> str:
    return made.variant.source.rstrip("\n")


def _recurrence(made: Made) -> str:
    r = made.recurrence
    print_, lines = _printer(r.states, made, [x for s in r.states for x in s.operands] + [e for _, e in r.outputs])
    for s in r.states:
        lines += [*print_.solved(s), print_.state(s)]
    lines += [f"{name}[t] = {print_.text(e)}" for name, e in r.outputs]
    proofs = list(r.proofs) or ["no state decays" if r.states[0].causal else "not causal: sums over all tokens, nothing decays"]
    return _section("recurrence", lines) + "\n" + _section("decay", proofs)


def _printer(states: tuple[State, ...], made: Made, roots: list[Expr]) -> tuple[Mathematics, list[str]]:
    """Makes a printer that knows the user's names and names what repeats; returns it with the lines that say what the names mean."""
    used = set(E.walk(*roots))
    names = {e: n for n, e in made.recurrence.names if e in used and e.args}
    printer = Mathematics(states, names)
    repeated = printer.name_repeated(roots)
    order = [n for n in E.walk(*roots) if n in printer.names and (n in names or n in repeated)]
    lines = [f"{printer.names[n]} = {printer.definition(n)}" for n in order]
    return printer, lines


def _chunk(made: Made) -> str:
    r = made.recurrence
    lowered: list[tuple[State, list[tuple[Expr, Expr]], Carry]] = []
    everything = [*(x for s in r.states for x in s.operands), *(e for _, e in r.outputs)]
    scanned = [s for s in r.states if s.peak or s.dense]
    for s in (s for s in r.states if s not in scanned):
        reads = [n for n in dict.fromkeys(n for e in everything for n in E.reads(e, "readout")) if n.name == s.name]
        x = reads[0].attr("dim") if reads else (*s.dims, "")[0]
        lowered.append((s, [(n, lower_readout(n, s, carry_of(s, n.attr("dim")))) for n in reads], carry_of(s, x, s.causal)))
    roots = [e for _, pairs, _ in lowered for pair in pairs for e in pair]
    roots += [x for _, _, carry in lowered for t in carry.terms for x in (t.near, t.far)]
    printer, lines = _printer(r.states, made, roots)
    for s, pairs, carry in lowered:
        gates = ", ".join(f"b{'_' + g.dims[0] if g.dims else ''} = cumsum({printer.text(g)})" for g in s.decay)
        lines += [f"{s.name}: {gates}"] if gates else []
        lines += [f"{printer.definition(n)} = {printer.text(e)}" for n, e in pairs]
        lines += [printer.carry(carry)] if s.causal else []
    for s in scanned:
        why = "a running maximum" if s.peak else "a decay for every element has no matmul form"
        lines.append(f"{s.name}: {why}: scanned token by token, in order inside a chunk")
    return _section("chunk", lines)


def _adjoint(made: Made) -> str:
    a = made.adjoint
    roots = [x for s in a.states for x in s.operands] + [e for _, e in a.gradients]
    printer, lines = _printer(made.recurrence.states + a.states, made, roots)
    lines += [x for s in a.states for x in (*printer.solved(s), printer.state(s))]
    lines += [f"d{name} = {printer.text(e)}" for name, e in a.gradients]
    lines += [
        f"{s.name}: the gradient goes through the maximum, to its larger side; where what {s.name} shifts cancels, its parts add up to 0"
        for s in made.recurrence.states
        if s.peak
    ]
    return _section("adjoint", lines)


def _plan(made: Made) -> str:
    from lagen.emit.cpp import fallback
    from lagen.passes.plan import plan

    slow, undone = fallback(made.recurrence, made.adjoint)
    what = "no generated C++" if slow else "no generated C++ for the backward"
    facts = [f"{what}, since {undone}: on the CPU the torch evaluation serves"] if undone else []
    try:
        planned = plan(made.recurrence, made.adjoint)
    except NotImplementedError as missing:
        return _section("plan", [f"no Triton kernels: {missing}", *facts])
    return str(planned) + ("\n" + _section("backends", facts) if facts else "") + ("\n" + _forms() if planned.borders else "")


def _forms() -> str:
    """Says which form a scan takes for a few shapes, and why (chunks and tiles of 64, dims of 128)."""
    from lagen.emit.forms import segments
    from lagen.targets.target import find

    target = find("cuda:90")
    lines = []
    for b, t, h in ((1, 8192, 8), (1, 65536, 1), (4, 4096, 16)):
        why = segments(b * h * 2, t // 64, target.processors, 1 << 20)[1]
        lines.append(f"B={b} T={t} H={h} K=V=128 bf16 on {target.name}: {why}")
    return _section("forms of a scan", lines)


def _source(made: Made) -> str:
    from lagen.emit.render import render

    return render(made.variant, made.recurrence, made.adjoint, tuned=find_tuned(made.variant.name, digest(made.recurrence)).entries)


def _tuned(made: Made) -> str:
    """Lists the configs that calls look up, by device, and what was passed over."""
    found = find_tuned(made.variant.name, digest(made.recurrence))
    lines = []
    for e in found.entries:
        dims = " ".join(f"{d}={n}" for d, n in e.dims)
        gain = f", {e.time:.0f} us against {e.default:.0f}" if e.default else ""
        lines.append(f"{e.device} {e.of} {e.dtype} {dims} T={e.tokens} BxH={e.heads}: {e.config} ({e.how}{gain})")
    lines += [f"not used: {m}" for m in found.misses]
    lines.append("a call takes the exact entry, else the nearest whose dims fill the same powers of two, else the defaults")
    return _section("tuned", lines)


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)])


STAGES: dict[str, Callable[[Made], str]] = {
    "variant": _variant,
    "recurrence": _recurrence,
    "adjoint": _adjoint,
    "chunk": _chunk,
    "plan": _plan,
    "source": _source,
    "tuned": _tuned,
}
"""The stages in the order in which the compiler makes them."""
