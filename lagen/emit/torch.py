"""Prints a Recurrence and its Adjoint as the three torch functions of a generated file: forward, backward, step.

One line per shared token-wise value and per readout; what a line calls (layout, chunked states, row functions) is the prelude
runtime/chunked.py, which travels with the file. The printer is closed: an op it does not know raises and names itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lagen.ir.expr import HEADS, Expr, number, reads, show, walk
from lagen.ir.plan import Buffer, Store
from lagen.ir.recurrence import Adjoint, Recurrence, State, closings
from lagen.ir.scalar import FUNCTIONS
from lagen.ir.variant import Tensor

WIDTH = 96  # characters after which a value gets a line of its own
_ATOM, _POWER, _SIGN, _PRODUCT, _SUM, _COMPARE = 5, 4, 3, 2, 1, 0
_LEVELS = {"add": _SUM, "sub": _SUM, "mul": _PRODUCT, "div": _PRODUCT, "neg": _SIGN}
_LEVELS |= dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), _COMPARE)
_RESERVED = frozenset(
    "torch chunked scans packed pool triton tl Tensor inputs params scale states initial_states output_final_state saved outputs "
    "final_states d_outputs d_final_states cu_seqlens dtype like edge B T H G HV".split()
)


def render_torch(recurrence: Recurrence, adjoint: Adjoint, assumptions: Sequence[Expr] = ()) -> str:
    """Prints torch_forward, torch_backward, torch_step and torch_assumptions of a variant."""
    parts = [_forward(recurrence), _backward(adjoint)]
    if all(s.causal for s in recurrence.states):
        parts.append(_step(recurrence))
    parts.append(_assumptions(recurrence, assumptions))
    return "\n\n".join(parts)


# ---- the four functions ---------------------------------------------------------------------------------------------------------


def _forward(r: Recurrence) -> str:
    p = _Printer(r)
    p.head(r.inputs, r.params)
    p.plan([*_bodies(r.states), *(e for _, e in r.outputs)])
    p.states(r.states, {s.name: p.edge(s, i, "initial_states") for i, s in enumerate(r.states)})
    outs = [p.lowered(p.text(e), e.head, dims, "inputs[0]") for (_, e), dims in zip(r.outputs, r.output_dims, strict=True)]
    p.line(f"outputs = {_tuple(outs)}")
    if all(s.causal for s in r.states):
        finals = [f'chunked.lower({p.state_names[s.name]}.final, {p.shape("B", s.head, s.dims)}, 1, "{s.head}", like)' for s in r.states]
        p.line("if not output_final_state:")
        p.line("    return outputs, None, ()")
        p.line(f"return outputs, {_tuple(finals, split=True)}, ()")
    else:
        p.line("return outputs, None, ()")
    doc = f'"""Computes {_list(n for n, _ in r.outputs)} and the final states in chunks."""'
    return "@packed.each_forward\n" + p.function("torch_forward(inputs, params, scale, initial_states, output_final_state)", doc)


def _backward(a: Adjoint) -> str:
    """Prints the backward. Every cotangent in it stands on the widest head, what a narrower one shares being dealt out in equal parts:
    a gradient is linear in them, so one sum at the end gathers the parts, and nothing is counted once a head on the way.
    """
    r = a.recurrence
    # a decay's gradient is a difference that cancels over the whole sequence: float32 would lose it where it is summed again
    gated = any(e.op == "suffix" for _, g in a.gradients for e in walk(g))
    p = _Printer(r, precision="torch.float64" if gated else "chunked.compute_dtype(inputs)")
    p.head(r.inputs, r.params)
    p.wide = max((t.head for t in r.inputs + r.params), key=HEADS.index)
    for i, t in enumerate(a.cotangents):
        p.leaf(t, f"d_outputs[{i}]", cotangent=True)
    used = _states_needed(a)
    p.plan([*_bodies(used), *_bodies(a.states), *(e for _, e in a.gradients)])
    edges = {s.name: p.edge(s, i, "initial_states") for i, s in enumerate(r.states)}
    causal = all(s.causal for s in r.states)
    index = {s.name: i for i, s in enumerate(r.states)}
    edges |= {s.name: p.edge(s, index[s.of], "d_final_states") for s in a.states}
    p.states(used, edges)
    p.states(a.states, edges, back=True)
    grads = {n: e for n, e in a.gradients}
    tokens = [p.lowered(p.text(grads[t.name]), t.head, t.dims, f"inputs[{i}]") for i, t in enumerate(r.inputs)]
    whole = [p.summed(p.text(grads[t.name]), t, f"params[{i}]") for i, t in enumerate(r.params)]
    p.line(f"d_inputs = {_tuple(tokens, split=True)}")
    p.line(f"d_params = {_tuple(whole, split=True)}")
    p.line("if initial_states is None:")
    p.line("    return d_inputs, d_params, None")
    if causal:
        starts = []
        for i, s in enumerate(r.states):
            shape = p.shape("B", s.head, s.dims)
            starts.append(f'chunked.lower({p.state_names[f"d{s.name}"]}.final, {shape}, 1, "{s.head}", initial_states[{i}])')
        p.line(f"return d_inputs, d_params, {_tuple(starts, split=True)}")
    signature = "torch_backward(inputs, params, scale, initial_states, saved, outputs, final_states, d_outputs, d_final_states)"
    return "@packed.each_backward\n" + p.function(
        signature, '"""Computes the gradients of inputs, params and initial states, from the inputs alone."""'
    )


def _step(r: Recurrence) -> str:
    p = _Printer(r, step=True)
    p.head(r.inputs, r.params)
    p.plan([*_bodies(r.states), *(e for _, e in r.outputs)])
    for i, s in enumerate(r.states):
        p.one_token(s, i)
    outs = [p.lowered(p.text(e), e.head, dims, "inputs[0]") for (_, e), dims in zip(r.outputs, r.output_dims, strict=True)]
    p.line(f"outputs = {_tuple(outs)}")
    for i, s in enumerate(r.states):
        now = p.now[s.name]
        p.line(f'states[{i}].copy_(chunked.lower({now}, {p.shape("B", s.head, s.dims)}, 1, "{s.head}", states[{i}]))')
    p.line("return outputs")
    return "@pool.by_slots\n" + p.function(
        "torch_step(inputs, params, scale, states)", '"""Computes one token\'s outputs and updates the states in place."""'
    )


def reads_neighbours(stores: Sequence[Store]) -> bool:
    """Tells whether what token-wise work stores reads the token after, which a sequence's last token does not have."""
    return any(n.op in ("lead", "follows") for n in walk(*(s.value for s in stores)))


def render_tokens(name: str, recurrence: Recurrence, loads: Sequence[Buffer], stores: Sequence[Store]) -> str:
    """Prints ``name``(inputs, params, stored, scale), which computes token-wise values from inputs and stored values.

    Where a value reads the token after, the function takes ``cu_seqlens`` as well.
    """
    p = _Printer(recurrence)
    p.packed = ", cu_seqlens" if reads_neighbours(stores) else ""
    p.head(recurrence.inputs, recurrence.params)
    for i, b in enumerate(loads):
        t = Tensor(b.name, b.head, b.dims, b.token)
        p.leaf(t, f"stored[{i}]")
        p.done[b.leaf] = p.done[_leaf(t)]
    p.plan([s.value for s in stores])
    out = []
    for s in stores:
        like = "inputs[0]" if s.buffer.dtype == "input" else "torch.empty((), dtype=torch.float32, device=inputs[0].device)"
        if s.summed:
            t = Tensor(s.buffer.name, s.buffer.head, s.buffer.dims, False)
            out.append(p.summed(p.text(s.value), t, "torch.empty((), dtype=dtype, device=inputs[0].device)"))
        else:
            out.append(p.lowered(p.text(s.value), s.buffer.head, s.buffer.dims, like))
    p.line(f"return {_tuple(out, split=True)}")
    return p.function(
        f"{name}(inputs, params, stored, scale{p.packed})", f'"""Computes {_list(s.buffer.name for s in stores)} token by token."""'
    )


def _assumptions(r: Recurrence, assumptions: Sequence[Expr]) -> str:
    if not assumptions:
        return "torch_assumptions = None\n"
    p = _Printer(r)
    p.head(r.inputs, r.params)
    p.plan(assumptions)
    rows = [f"({show(e)!r}, {p.text(e)})" for e in assumptions]
    p.line(f"return {_tuple(rows, split=True)}")
    return p.function("torch_assumptions(inputs, params, scale)", '"""Evaluates what the spec assumes: pairs of text and truth."""')


def _bodies(states: Iterable[State]) -> list[Expr]:
    return [x for s in states for x in s.operands]


def _states_needed(a: Adjoint) -> tuple[State, ...]:
    """Returns the forward states that the backward reads, with those their own bodies read."""
    needed: set[str] = set()
    roots = [*_bodies(a.states), *(e for _, e in a.gradients)]
    for s in reversed(a.recurrence.states):
        names = {n.name for n in reads(_group(roots), "readout")}
        closing = {name for n in reads(_group(roots), "suffix") for name in n.attr("states").split()}
        if s.name in names | closing:
            needed.add(s.name)
            roots += _bodies([s])
    return tuple(s for s in a.recurrence.states if s.name in needed)


def _group(roots: Sequence[Expr]) -> Expr:
    return Expr("group", tuple(dict.fromkeys(roots)))


def _tuple(parts: Sequence[str], split: bool = False) -> str:
    if not parts:
        return "()"
    if split and sum(map(len, parts)) > WIDTH:
        return "(\n" + "".join(f"        {part},\n" for part in parts) + "    )"
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


# ---- one function ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Printer:
    """One function being printed: its lines, and what each expression is called by now."""

    recurrence: Recurrence
    step: bool = False
    precision: str = "chunked.compute_dtype(inputs)"
    wide: str = ""  # the head that cotangents stand on
    lines: list[str] = field(default_factory=list)
    done: dict[Expr, tuple[str, int]] = field(default_factory=dict)
    uses: Counter[Expr] = field(default_factory=Counter)
    taken: set[str] = field(default_factory=set)
    packed: str = ""  # the argument that says where sequences end, where one function computes several
    state_names: dict[str, str] = field(default_factory=dict)
    by_name: dict[str, State] = field(default_factory=dict)
    past: dict[str, str] = field(default_factory=dict)
    faded: dict[str, str] = field(default_factory=dict)
    now: dict[str, str] = field(default_factory=dict)

    def line(self, text: str) -> None:
        self.lines.append(text)

    def function(self, signature: str, doc: str) -> str:
        return "\n".join([f"def {signature}:", f"    {doc}", *(f"    {x}" for x in _pruned(self.lines)), ""])

    def fresh(self, name: str) -> str:
        """Returns ``name``, or the first of name1, name2, ... that is free."""
        at, stem = 0, name + "_" if name in _RESERVED else name
        free = stem
        while free in self.taken:
            at += 1
            free = f"{stem}{at}"
        self.taken.add(free)
        return free

    # -- layout --

    @property
    def axis(self) -> int:
        return 1 if self.step else 2

    def heads(self, head: str) -> str:
        return {"": "1, 1", "H": "H, 1", "HV": "H, G"}[head]

    def shape(self, lead: str, head: str, dims: Sequence[str]) -> str:
        return f"({', '.join(filter(None, [lead, self.heads(head), *dims]))})"

    def head(self, inputs: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        """Prints sizes and brings inputs and params to the prelude's layout."""
        r = self.recurrence
        self.taken |= {d for t in (*inputs, *params) for d in t.dims} | {d for d, _ in r.sizes}
        self.line(f"dtype = {self.precision}")
        self.line("B = inputs[0].shape[0]" if self.step else "B, T = inputs[0].shape[:2]")
        where: dict[str, str] = {}
        skip = 1 if self.step else 0
        for group, tensors in (("inputs", inputs), ("params", params)):
            for i, t in enumerate(tensors):
                for axis, dim in enumerate(t.shape):
                    where.setdefault(dim, f"{group}[{i}].shape[{axis - (skip if t.token else 0)}]")
        if "H" in where or "HV" in where:
            self.line(f"H = {where.get('H', where.get('HV'))}")
        if "HV" in where:
            self.line(f"G = {where['HV']} // H  # values of HV that share one of H" if "H" in where else "G = 1")
        for dim in (d for d in where if d not in ("B", "T", "H", "HV")):
            self.line(f"{dim} = {where[dim]}")
        for dim, size in r.sizes:
            self.line(f"{dim} = {_whole(size)}")
        for i, t in enumerate(inputs):
            self.leaf(t, f"inputs[{i}]")
        for i, t in enumerate(params):
            self.leaf(t, f"params[{i}]")
        self.line(f"like = {self.done[_leaf(inputs[0])][0]}")

    def leaf(self, t: Tensor, source: str, cotangent: bool = False) -> None:
        """Prints the line that brings one tensor to the prelude's layout."""
        name = self.fresh(t.name)
        axis = self.axis if t.token else 0
        heads = "(H, G)" if t.head == "HV" else "None"
        swap = ".transpose(-1, -2)" if list(t.dims) != sorted(t.dims) else ""
        lead = ("B, " if self.step else "B, T, ") if t.token else ""
        text = f'chunked.lift({source}, {axis}, "{t.head}", {heads}, dtype){swap}'
        if cotangent and t.head != self.wide:
            text = f"chunked.share({text}, {axis}, ({self.heads(self.wide)}))"
        comment = f"[{lead}{', '.join([self.heads(self.wide if cotangent else t.head), *sorted(t.dims)])}]"
        self.line(f"{name} = {text}  # {comment}")
        self.done[_leaf(t)] = (name, _ATOM)

    def lowered(self, text: str, head: str, dims: tuple[str, ...], like: str) -> str:
        """Returns the text that hands a token value out in the layout and dtype of the outside."""
        shape = self.shape("B" if self.step else "B, T", head, sorted(dims))
        swap = ", swap=True" if list(dims) != sorted(dims) else ""
        return f'chunked.lower({text}, {shape}, {self.axis}, "{head}", {like}{swap})'

    def summed(self, text: str, t: Tensor, like: str) -> str:
        """Returns the text that sums a param's gradient over batch and time."""
        shape, swap = self.shape("", t.head, sorted(t.dims)), ", swap=True" if list(t.dims) != sorted(t.dims) else ""
        return f'chunked.lower(chunked.sum_tokens({text}, (B, T), {shape}, like), {shape}, 0, "{t.head}", {like}{swap})'

    # -- states --

    def edge(self, s: State, index: int, group: str) -> str:
        """Returns the text of the state before the first token (of a reverse state: behind the last)."""
        if not s.causal:
            return "None"
        heads = "(H, G)" if s.head == "HV" else "None"
        given = f'chunked.lift({group}[{index}], 1, "{s.head}", {heads}, dtype)'
        if s.reverse and s.head != self.wide:
            given = f"chunked.share({given}, 1, ({self.heads(self.wide)}))"
        none = "None" if s.init == 0.0 else f"like.new_full({self.shape('B', s.head, s.dims)}, {s.init!r})"
        return f"{none} if {group} is None else {given}"

    def states(self, states: Sequence[State], edges: dict[str, str], back: bool = False) -> None:
        """Prints states in stage order, each after the values it writes; ``back``: those of the backward."""
        for s in states:
            name = self.state_names[s.name] = self.fresh(s.name)
            self.by_name[s.name] = s
            flag = [f", {w.decayed}" if s.reverse else "" for w in s.writes]
            base = {u.leaf: u.base for u in s.solves}  # what is solved is handed over as what it is without its reads
            pairs = [(base.get(w.row, w.row), base.get(w.col, w.col)) for w in s.writes]
            writes = ", ".join(f"({self.text(row)}, {self.text(col)}{f})" for (row, col), f in zip(pairs, flag, strict=True))
            options = (", reverse=True" if s.reverse else "") + ("" if s.causal else ", causal=False")
            options += f', over="{s.solves[0].reads[0].attr("dim")}", solves={self.solves(s)}' if s.solves else ""
            self.line(f"edge = {edges[s.name]}")
            head = self.wide if back else s.head
            lead = f"{_names(s.dims)}, {self.shape('B', head, s.dims)}, T"
            if s.peak:
                self.line(f"{name} = scans.Peak({lead}, {self.shift(s)}, {self.text(s.writes[0].row)}, edge, like)")
                continue
            decay = self.text(s.decay[0]) if s.dense else self.decay(s)
            made = [lead, f"[{writes}]", decay, f"edge, like{options}"]
            self.line(_call(f"{name} = {'scans.Dense' if s.dense else 'chunked.State'}", made))
            for i, w in enumerate(s.writes):
                for u in (x for x in (w.row, w.col) if x.op == "solved"):
                    solved = self.fresh(u.name)
                    self.line(f"{solved} = {name}.solved({i})")
                    self.done[u] = solved, _ATOM

    def solves(self, s: State) -> str:
        """Returns what a state solves, by write: the reads of its own past."""
        at = {x: i for i, w in enumerate(s.writes) for x in (w.row, w.col)}
        reads = [(at[u.leaf], ", ".join(f'({self.text(r.args[0])}, "{r.attr("at")}")' for r in u.reads)) for u in s.solves]
        return "{" + ", ".join(f"{i}: [{text}]" for i, text in reads) + "}"

    def shift(self, s: State) -> str:
        """Prints what is added to a peak's past."""
        return self.operand(s.decay[0], s.dims) if s.decay else "0.0"

    def decay(self, s: State) -> str:
        rows = ", ".join(f'"{"".join(g.dims) if len(g.dims) < 2 else "*"}": {self.text(g)}' for g in s.decay)
        return f"{{{rows}}}"

    def one_token(self, s: State, index: int) -> None:
        """Prints a state's past, decayed past and present."""
        heads = "(H, G)" if s.head == "HV" else "None"
        past = self.past[s.name] = self.fresh(f"{s.name}_past")
        self.by_name[s.name] = s
        self.line(f'{past} = chunked.lift(states[{index}], 1, "{s.head}", {heads}, dtype)')
        self.faded[s.name] = past
        if s.peak:
            self.now[s.name] = self.fresh(f"{s.name}_now")
            self.line(f"{self.now[s.name]} = torch.maximum({past} + {self.shift(s)}, {self.text(s.writes[0].row)})")
            return
        if s.decay:
            faded = self.faded[s.name] = self.fresh(f"{s.name}_decayed")
            self.line(f"{faded} = chunked.decayed({past}, {_names(s.dims)}, {self.decay(s)})")
        for u in s.solves:
            self.done[u.leaf] = self.text(u.value, _ATOM), _ATOM
        now = self.now[s.name] = self.fresh(f"{s.name}_now")
        writes = ", ".join(f"({self.text(w.row)}, {self.text(w.col)})" for w in s.writes)
        self.line(f"{now} = chunked.written({self.faded[s.name]}, {_names(s.dims)}, [{writes}])")

    # -- values --

    def plan(self, roots: Sequence[Expr]) -> None:
        """Counts how often each value is used, so that shared ones get a line."""
        roots = [*roots]
        for node in walk(*roots):
            self.uses.update(node.args)
        self.uses.update(roots)

    def text(self, e: Expr, level: int = 0) -> str:
        """Returns the text of a value, in parentheses where ``level`` binds tighter; prints the lines it needs."""
        if e not in self.done:
            self.done[e] = self.named(e, *self.form(e))
        body, own = self.done[e]
        return f"({body})" if own < level else body

    def named(self, e: Expr, body: str, level: int) -> tuple[str, int]:
        """Gives a value a line of its own where it is a readout, shared or long."""
        atom = level == _ATOM and body.replace("_", "").isalnum()
        plain = _is_number(e) or e.op == "neg" or atom
        if plain or not (e.op in ("readout", "suffix") or self.uses[e] > 1 or len(body) > WIDTH):
            return body, level
        known = {x: n for n, x in self.recurrence.names}
        stem = f"{e.name}_{e.attr('at')}" if e.op == "readout" else "dg" if e.op == "suffix" else known.get(e, "x")
        name = self.fresh(stem)
        lead = ("B, " if self.step else "B, T, ") if e.token else ""
        self.line(f"{name} = {body}  # [{lead}{', '.join([self.heads(e.head), *e.dims])}]")
        return name, _ATOM

    def operand(self, a: Expr, dims: tuple[str, ...], level: int = 0) -> str:
        """Returns the text of an operand with an axis for each of ``dims``."""
        if a.dims == dims or _is_number(a):
            return self.text(a, level)
        missing = ", ".join(":" if d in a.dims else "None" for d in dims)
        index = "None" if missing == ":, None" else missing
        return f"{self.text(a, _ATOM)}[..., {index}]"

    def vector(self, a: Expr) -> str:
        """Returns the text of an operand that must be a tensor."""
        return f"chunked.constant({self.text(a)}, like)" if _is_number(a) else self.text(a)

    def form(self, e: Expr) -> tuple[str, int]:
        """Returns the text of one op over its operands, and how tightly it binds."""
        if e.op == "const":
            return (number(e.value) if abs(e.value) < 1e15 else repr(e.value)), _ATOM if e.value >= 0 else _SIGN
        if e.op == "size":
            return e.name, _ATOM
        if e.op == "scale":
            return "scale", _ATOM
        if e.op in _LEVELS:
            own = _LEVELS[e.op]
            tight = [own, own] if e.op in ("add", "mul") else [own, own + 1]
            args = [self.operand(a, e.dims, t) for a, t in zip(e.args, tight, strict=False)]
            return FUNCTIONS[e.op].torch.format(*args), own
        if e.op in FUNCTIONS:
            return self.function_form(e)
        if e.op == "pow":
            return f"{self.text(e.args[0], _ATOM)} ** {number(e.value) if e.value >= 0 else f'({number(e.value)})'}", _POWER
        if e.op == "readout":
            return self.readout(e), _ATOM
        if e.op == "suffix":
            return self.suffix(e), _ATOM
        return self.row(e)

    def function_form(self, e: Expr) -> tuple[str, int]:
        """Returns an element-wise call; numbers become tensors where torch takes none."""
        if e.op in ("min", "max") and sum(map(_is_number, e.args)) == 1:
            x, bound = sorted(e.args, key=_is_number)
            return f"torch.clamp({self.text(x)}, {_BOUND[e.op]}={self.text(bound)})", _ATOM
        if e.op == "where" and not all(map(_is_number, e.args[1:])):
            return FUNCTIONS[e.op].torch.format(*(self.operand(a, e.dims) for a in e.args)), _ATOM
        args = [self.operand(a, e.dims) if not _is_number(a) else self.vector(a) for a in e.args]
        return FUNCTIONS[e.op].torch.format(*args), _ATOM

    def readout(self, e: Expr) -> str:
        over, at, vector = e.attr("dim"), e.attr("at"), self.text(e.args[0])
        if not self.step:
            return f'{self.state_names[e.name]}.read({vector}, "{over}", "{at}")'
        state = {"now": self.now, "decayed": self.faded, "previous": self.past}[at][e.name]
        return f'chunked.contracted({state}, {_names(self.by_name[e.name].dims)}, {vector}, "{over}")'

    def suffix(self, e: Expr) -> str:
        keep = "".join(e.dims)
        ends = ", ".join(f'{self.state_names[s]}.closing({self.state_names[back]}, "{keep}")' for s, back in closings(e))
        x, y = (self.text(a) for a in e.args)
        return f"chunked.suffix({x}, {y}, [{ends}], {self.shape('B, T', self.wide, e.dims)}, like)"

    def row(self, e: Expr) -> tuple[str, int]:
        """Returns the text of an op on a token's own vector."""
        a = [self.vector(x) for x in e.args]
        if e.op == "contract":
            return self.contraction(e), _ATOM
        if e.op == "outer":
            left, right = sorted(e.args, key=lambda x: x.dims)
            return f"{self.text(left, _ATOM)}[..., :, None] * {self.text(right, _ATOM)}[..., None, :]", _PRODUCT
        if e.op in ("sum", "mean", "rowmax"):
            axis = e.args[0].dims.index(e.attr("dim")) - len(e.args[0].dims)
            return f"{self.text(e.args[0], _ATOM)}.{e.op.replace('row', 'a')}({axis})", _ATOM
        if e.op == "softmax":
            return f"torch.softmax({a[0]}, -1)", _ATOM
        if e.op in ("l2norm", "rmsnorm"):
            return f"chunked.{e.op}({a[0]}, {e.value!r})", _ATOM
        if e.op in ("concat", "taylor2", "quad"):
            return f"chunked.{e.op}({', '.join(a)})", _ATOM
        if e.op in ("untaylor2", "unquad"):
            return f"chunked.{e.op[2:]}_adjoint({', '.join(a)})", _ATOM
        if e.op == "rename":
            return self.text(e.args[0]), self.done[e.args[0]][1]
        if e.op == "expand":
            return self.expanded(e)
        if e.op == "lead":
            return f"chunked.lead({a[0]}{self.packed})", _ATOM
        if e.op == "follows":
            return f"chunked.follows(T, like{self.packed})", _ATOM
        if e.op == "part":
            first = f"{self.text(e.args[1], _ATOM)}.shape[-1]"
            return f"{self.text(e.args[0], _ATOM)}[..., {f':{first}' if e.attr('index') == '0' else f'{first}:'}]", _ATOM
        raise NotImplementedError(f"no torch form for the op {e.op!r} in {e}")

    def contraction(self, e: Expr) -> str:
        a, b = e.args
        dim = e.attr("dim")
        if len(a.dims) == len(b.dims) == 1:
            return f"({self.text(a, _PRODUCT)} * {self.text(b, _PRODUCT + 1)}).sum(-1)"
        letters = {d: chr(ord("i") + i) for i, d in enumerate(sorted({*a.dims, *b.dims}))}
        sides = ["..." + "".join(letters[d] for d in x.dims) for x in (a, b)]
        left = "..." + "".join(letters[d] for d in sorted({*a.dims, *b.dims} - {dim}))
        return f'torch.einsum("{sides[0]},{sides[1]}->{left}", {self.text(a)}, {self.text(b)})'

    def expanded(self, e: Expr) -> tuple[str, int]:
        """Returns a value repeated over the dims it lacks."""
        (x,) = e.args
        if _is_number(x):
            return self.text(x), self.done[x][1]
        body, have = self.text(x), list(x.dims)
        for d in [d for d in e.dims if d not in have]:
            at = len([h for h in have if h > d])
            body = f"chunked.repeat({body}, {d}, {-1 - at})"
            have = sorted([*have, d])
        return body, _ATOM


_BOUND = {"max": "min", "min": "max"}  # max(x, c) has c as its least value


def _pruned(lines: list[str]) -> list[str]:
    """Drops the assignments of names that no later line reads."""
    kept: list[str] = []
    for line in reversed(lines):
        name = re.match(r"(\w+) = ", line)
        if name is None or any(re.search(rf"\b{name[1]}\b", later.partition("  # ")[0]) for later in kept):
            kept.append(line)
    return kept[::-1]


def _leaf(t: Tensor) -> Expr:
    return Expr("input" if t.token else "param", name=t.name, dims=tuple(sorted(t.dims)), head=t.head, token=t.token)


def _call(head: str, arguments: Sequence[str]) -> str:
    """Prints a call on one line where it fits, else an argument a line."""
    line = f"{head}({', '.join(arguments)})"
    return line if len(line) <= 132 else f"{head}(\n" + "".join(f"        {a},\n" for a in arguments) + "    )"


def _names(dims: Sequence[str]) -> str:
    return _tuple([f'"{d}"' for d in dims])


def _is_number(e: Expr) -> bool:
    """Tells whether a value prints as a Python number."""
    if e.op in ("const", "size", "scale"):
        return True
    return (e.op in _LEVELS or e.op in ("pow", "expand", "rename")) and all(map(_is_number, e.args))


def _whole(size: Expr) -> str:
    """Prints the size of a derived dim as an integer expression."""
    signs = {"add": "+", "sub": "-", "mul": "*", "div": "//"}
    if size.op == "const":
        return number(size.value)
    if size.op == "size":
        return size.name
    if size.op == "pow":
        return f"({_whole(size.args[0])}) ** {number(size.value)}"
    if size.op not in signs:
        raise NotImplementedError(f"no size form for {size}")
    return f"({_whole(size.args[0])} {signs[size.op]} {_whole(size.args[1])})"
