"""Prints a plan as a Triton module: device functions, kernels, and the launchers triton_forward, triton_backward, triton_step."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from lagen.emit.forms import segments
from lagen.emit.kernels import Printed, is_looped, print_kernel
from lagen.emit.reserved import rename_reserved
from lagen.emit.roles import merge_arguments, print_roles
from lagen.emit.scan import print_scan, rows_of
from lagen.emit.templates import environment
from lagen.emit.torch import reads_neighbours, render_tokens
from lagen.ir import expr as E
from lagen.ir.chunk import COL
from lagen.ir.expr import Expr, show
from lagen.ir.plan import Buffer, Kernel, Plan
from lagen.ir.recurrence import Adjoint, Recurrence, State
from lagen.ir.variant import Tensor
from lagen.passes.plan import plan as make_plan
from lagen.passes.schedule import default_chunk, held_whole, is_narrow, is_sum, place, tiles, widest

_CALLS = {
    "lg_reach": ("lg_decay",),
    "lg_start": ("lg_decay",),
    "lg_end": ("lg_decay",),
    "lg_logsigmoid": ("lg_log1p",),
    "lg_softplus": ("lg_log1p",),
}
"""Device functions that a device function calls."""


def render_triton(recurrence: Recurrence, adjoint: Adjoint) -> str:
    """Prints the Triton part of a variant's module; its launchers look configs up in the module's table TUNED."""
    recurrence, adjoint = rename_reserved(recurrence, adjoint)
    return _Module(recurrence, adjoint, make_plan(recurrence, adjoint)).render()


class _Module:
    """One module while it is printed."""

    def __init__(self, recurrence: Recurrence, adjoint: Adjoint, plan: Plan) -> None:
        self.r, self.a, self.plan = recurrence, adjoint, plan
        self.tensors = recurrence.inputs + recurrence.params
        self.top = max((t.head for t in self.tensors), key=E.HEADS.index)
        self.states = {s.name: s for s in plan.states}
        self.heads = {t.name: t.head for t in self.tensors} | {t.name: self.top for t in adjoint.cotangents}
        buffers = [s.buffer for k in plan.forward + plan.backward + plan.step for s in k.stores]
        self.buffers = {b.name: b for b in buffers}
        self.heads |= {b.name: b.head for b in buffers if b.name not in self.heads}
        self.exact = frozenset(b.name for b in buffers if b.dtype == "float32") | {f"total_{s.name}" for s in plan.states}
        self.heads |= {f"total_{s.name}": s.head for s in plan.states if not s.causal}
        self.dims = tuple(dict.fromkeys(d for t in self.tensors for d in t.dims))
        self.chunk = default_chunk(plan.forward + plan.backward, recurrence.chunk_default)

    def render(self) -> str:
        """Prints device functions, kernels, launchers."""
        parts: list[str] = []
        kernels: list[str] = []
        functions: list[str] = []
        prelude: set[str] = set()
        done: dict[Kernel, Printed | str] = {}
        for k in self.plan.borders + self.plan.forward + self.plan.backward + self.plan.step:
            if k in done:
                continue
            if k.kind == "torch":
                kernels.append(render_tokens(k.name, self.r, self.loads(k), k.stores))
                done[k] = k.name
                continue
            states = {s.name: s for s in k.states} if k.kind == "step" else self.states
            top = self.top_of(k)
            printed = (print_scan if k.kind == "scan" else print_kernel)(k, self.r, states, self.heads, top, self.exact)
            prelude |= set(printed.prelude)
            kernels.append(printed.source)
            done[k] = printed
            self.done = done
            if k.launch and k == self.beside(k)[-1]:
                kernels.append(print_roles(k.launch, [p for x in self.beside(k) if isinstance(p := done[x], Printed)]))
        prelude |= {c for p in prelude for c in _CALLS.get(p, ())}
        macros = environment().get_template("triton/prelude.py.j2").module
        first = [name for name in ("lg_sequence", "lg_decay", "lg_log1p") if name in prelude]
        order = [*first, *sorted(prelude - set(first))]
        parts += [str(getattr(macros, name)()).strip("\n") for name in order]
        functions = [self.forward(done), self.backward(done)] + ([self.step(done)] if self.plan.step else [])
        launch = (
            environment()
            .get_template("triton/launch.py.j2")
            .render(
                functions=functions,
                chunk=self.chunk,
                scans=any(k.kind == "scan" for k in self.plan.forward),
                sums=any(is_sum(k) for k in self.plan.borders),
                saves=len(self.plan.saved),
                segments=_printed(segments),
                tiles=_printed(tiles),
            )
        )
        return "\n\n\n".join([*parts, *(k.strip("\n") for k in kernels), launch.strip("\n")]) + "\n"

    def beside(self, k: Kernel) -> list[Kernel]:
        """Lists the kernels that are roles of one launch with ``k``."""
        return [x for x in self.plan.forward + self.plan.backward if x.launch == k.launch]

    def top_of(self, k: Kernel) -> str:
        """Returns the head that a kernel has a program for each of."""
        if k.late:
            return max((s.head for s in k.states), key=E.HEADS.index)
        return k.stores[0].buffer.head if k.name.startswith("prepare") else self.top

    def loads(self, k: Kernel) -> list[Buffer]:
        """Lists the stored values that a token-wise kernel loads; torch operations are handed the cotangents as well."""
        nodes = [n for s in k.stores for n in E.walk(s.value)]
        names = dict.fromkeys(n.name for n in nodes if n.op == "stored")
        read = {n.name for n in nodes if n.op == "input"} if k.kind == "torch" else set()
        cotangents = [Buffer(t.name, t.head, t.dims, True, "input") for t in self.a.cotangents if t.name in read]
        return [*(self.buffers[n] for n in names), *cotangents]

    # -- launchers ----------------------------------------------------------------------------------------------------------------

    def sizes(self, step: bool) -> list[str]:
        """Prints unpacking, sizes and dtypes."""
        lines = []
        if self.r.inputs:
            lines.append(f"{', '.join(t.name for t in self.r.inputs)}, = map(_unit, inputs)")
        lines += [f"{t.name} = {t.name}.contiguous()" for t in self.r.inputs if len(t.dims) == 2]
        if self.r.params:
            lines.append(f"{', '.join(t.name for t in self.r.params)}, = (x.contiguous() for x in params)")
        first = self.r.inputs[0].name
        lines.append(f"B = {first}.shape[0]" if step else f"B, T = {first}.shape[:2]")
        if not step:
            lines.append("NSEQ = B if cu_seqlens is None else cu_seqlens.shape[0] - 1  # sequences")
        shift = -1 if step else 0
        where: dict[str, str] = {}
        for t in self.tensors:
            for axis, dim in enumerate(t.shape):
                where.setdefault(dim, f"{t.name}.shape[{axis + (shift if t.token else 0)}]")
        top = where.get(self.top, "1") if self.top else "1"
        lines.append(f"HV = {top}" + (f"\nG = HV // {where['H']}" if self.top == "HV" and "H" in where else "\nG = 1"))
        for dim in (d for d in where if d not in ("B", "T", "H", "HV")):
            lines.append(f"{dim} = {where[dim]}")
        for dim, size in self.r.sizes:
            lines.append(f"{dim} = {_whole(size)}")
        lines.append(f"dtype, device = {first}.dtype, {first}.device")
        return [x for line in lines for x in line.split("\n")]

    def shape(self, b: Buffer, step: bool = False) -> str:
        """Prints the shape of a buffer."""
        lead = [f"triton.cdiv({b.partial}, B{b.partial})"] if b.partial else []
        lead += ["B"] if step else ["B", "_rows(T, BT, cu_seqlens)" if b.per else "T"]
        heads = [] if not b.head else ["HV" if b.head == self.top else "HV // G"]
        dims = ["BT" if d == COL else d for d in b.dims]
        return f"({', '.join([*lead, *heads, *dims])},)"

    def dtype(self, b: Buffer) -> str:
        """Prints the dtype of a buffer."""
        if b.dtype == "own":
            name = b.name[1:]
            narrow = next(t.head for t in self.tensors if t.name == name) != b.head
            return f"torch.float32 if {'G > 1' if self.top == 'HV' else 'HV > 1'} else {name}.dtype" if narrow else f"{name}.dtype"
        return "torch.float32" if b.dtype == "float32" else "dtype"

    def tiles(self, kernels: list[Kernel], pass_: str) -> list[str]:
        """Prints the configuration of a pass: one chunk, one tile per dim on the grid (tiles share sums), blocks of whole dims."""
        cap = widest(kernels)
        held = dict.fromkeys(d for k in kernels if k.kind != "tokens" for d in self.kernel_dims(k) if d != k.tile)
        fits = [f"_fits({', '.join(f'{d}={d}' for d in held)})"] if held else []
        lines: list[str] = []
        for k in kernels:
            whole = [f"_block({d})" for d in self.kernel_dims(k) if d != k.tile]
            most = f"max({', '.join(whole)})" if len(whole) > 1 else (whole or ["16"])[0]
            most = "16" if is_narrow(k) else most
            if k.kind == "chunks" and k.tile:
                lines.append(f'BT, B{k.tile}_chunk = _config(tuned, rule, "{place(k)}", {k.tile}, 16, {cap[place(k)]})[:2]')
            elif k.runs or (k.kind == "step" and not k.late):
                called = f'_config(tuned, rule, "{place(k)}", {k.tile or 16}, {most}, {cap.get(place(k), 64)})'
                lines.append(f"BT, {f'B{k.tile}' if k.tile else '_'}, warps_{k.name}, stages_{k.name} = {called}")
            if k.kind == "scan":
                lines.append(f'B{k.tile} = B{k.tile} if "{place(k)}" in tuned else _scan_tile(B{k.tile}, {k.tile}, NSEQ * HV, device)')
                rows = rows_of(k)
                lines += [f"B{rows}, G{rows} = _tiles_of_rows({rows})"] if rows else []
                lines.append(f"warps_{k.name} = _scan_warps(B{k.tile}{f' * B{rows}' if rows else ''})")
        if not lines:
            return [*fits, f"BT = {self.chunk}"]
        dims = "".join(f'("{d}", {d}), ' for d in self.dims if d not in dict(self.r.sizes)).rstrip()
        sides = held_whole(self.plan)
        longest = f"max({', '.join(sides)})" if len(sides) > 1 else (sides or ("1",))[0]
        return [*fits, f'tuned, rule = _tuned("{pass_}", dtype, ({dims}), {"1" if pass_ == "step" else "T"}, B * HV, {longest})', *lines]

    def kernel_dims(self, k: Kernel) -> tuple[str, ...]:
        """Lists a kernel's dims."""
        p = self.done[k]
        return p.dims if isinstance(p, Printed) else ()

    def launch(self, k: Kernel, step: bool) -> list[str]:
        """Prints one launch."""
        p = self.done[k]
        if k.launch:
            return self.roles(self.beside(k)) if k == self.beside(k)[0] else []
        if isinstance(p, str):
            loads = self.loads(k)
            stored = ", ".join(f"{b.name}.sum(0)" if b.partial else b.name for b in loads) + ("," if len(loads) == 1 else "")
            names = ", ".join(s.buffer.name for s in k.stores) + ","
            packed = (", None" if step else ", cu_seqlens") if reads_neighbours(k.stores) else ""
            fix = [f"{s.buffer.name} = {s.buffer.name}[None, None]" for s in k.stores if s.summed]
            call = f"{names} = {p}({'inputs' if not step else 'tuple(x[:, None] for x in inputs)'}, params, ({stored}), scale{packed})"
            return [call, *fix, *([f"{s.buffer.name} = {s.buffer.name}[:, 0]" for s in k.stores] if step else [])]
        lines, args, grid = self.call(k, p, step)
        warps, stages = (f"warps_{k.name}", f"stages_{k.name}") if k.runs or k.kind == "step" else ("8", "1")
        if k in self.plan.borders and is_sum(k):
            stages = f"_stages_of_a_sum({stages})"
        if k.late:
            warps, stages = "warps_step" if k.tile else "4", "1"  # tiles as the step's, or a few vectors
        warps = "4" if k.kind == "chunks" and not k.tile else warps  # one tile of pair weights
        only = "apart and " if k.late else ""
        return lines + self.calls(k.name, grid, [x for _, x in args], warps, stages, only)

    def calls(self, name: str, grid: str, args: list[str], warps: str, stages: str, only: str = "") -> list[str]:
        """Prints the call of a kernel, left out where there is nothing to do."""
        return [
            f"if {only}{grid} > 0 and _launches({self.r.inputs[0].name}):",
            f"    {name}[({grid},)](",
            *(f"        {a}," for a in args),
            f"        num_warps={warps}, num_stages={stages}, enable_fp_fusion=True,",
            "    )",
        ]

    def call(self, k: Kernel, p: Printed, step: bool) -> tuple[list[str], list[tuple[str, str]], str]:
        """Prints what a launch needs before it, its arguments (each with the parameters that take it), and its grid."""
        lines = []
        for s in k.stores:
            b = s.buffer
            if s.summed:
                rows = "B * NSEG, 1" if k.kind == "scan" else "_rows(T, BT, cu_seqlens), B"
                lines.append(f"{b.name} = torch.empty(({rows}, HV, {', '.join(b.dims)}), dtype=torch.float32, device=device)")
            elif k.kind == "tokens" and step:
                lines.append(
                    f"{b.name} = torch.empty({self.shape(b, step).replace('(B', '(B, 1', 1)}, dtype={self.dtype(b)}, device=device)"
                )
            elif k.kind != "step":
                lines.append(f"{b.name} = torch.empty({self.shape(b, step)}, dtype={self.dtype(b)}, device=device)")
        for h in k.holds:
            if h.sink.startswith("total_"):
                state = self.states[h.carry.state]
                lines.append(f"{h.sink} = torch.empty({self.state_shape(state, False)}, dtype=torch.float32, device=device)")
        for h in (h for h in k.holds if h.mark):
            shape = ", ".join(["B", "HV", "_rows(T, BT, cu_seqlens)", *self.states[h.carry.state].dims])
            dtype = next((self.dtype(b) for b in self.plan.saved if b.name == h.mark), "dtype")
            lines.append(f"{h.mark} = torch.empty(({shape}), dtype={dtype}, device=device)")
        args = []
        for name, _ in p.tensors:
            made = next((s.buffer for s in k.stores if s.buffer.name == name), None)
            summed = any(s.summed and s.buffer.name == name for s in k.stores)
            token = made.token if made else self.token(name)
            value = f"{name}[:, None]" if step and k.kind == "tokens" and name in self.heads and not made else name
            if not token or summed:
                args.append(name)
                continue
            head = made.head if made else self.heads[name]
            partial = (made or self.buffers.get(name) or Buffer(name, head, (), True, "")).partial
            lead = 2 + bool(head)
            if partial:
                args.append(f"{value}, *{value}.stride()[1:{lead + 1}], {value}.stride(0)")
            elif k.kind == "step":
                args.append(f"{value}, {value}.stride(0), 0" + (f", {value}.stride(1)" if head else ""))
            else:
                args.append(f"{value}, *{value}.stride()[:{lead}]")
        sweep = k.runs and k not in self.plan.borders
        for name, _ in p.states:
            args.append(self.pointer(self.cut_name(name) if sweep else name))
        if p.scaled:
            args.append("scale")
        args.append("slots" if k.kind == "step" else "None, 1" if step else "cu_seqlens, NSEQ")
        heads = "HV" if (top := self.top_of(k)) == self.top else "HV // G" if top else "1"
        grid = {
            "sweep": f"NSEQ * {heads} * NY" if k in self.plan.borders else f"B * {heads} * NY * {'NC' if k.parallel else 'NSEG'}",
            "scan": f"B * {heads} * NY * NSEG",
            "step": f"B * {heads}" + " * NY" * bool(k.tile),
            "tokens": f"B * {heads} * NC" + (" * NY" if k.tile else ""),
            "chunks": f"B * {heads} * NC" + ("" if is_looped(k) else " * NY"),
        }[k.kind]
        block = f"B{k.tile}_chunk" if k.kind == "chunks" else f"min(64, _block({k.tile}))" if k.kind == "tokens" else f"B{k.tile}"
        tile = f"triton.cdiv({k.tile}, {block})" if k.tile else "1"
        if k.kind == "sweep":
            lines.append(f"NY, NC = {tile}, _rows(T, BT, cu_seqlens)" if k.parallel else f"NY = {tile}")
            if k in self.plan.borders:
                args.append("T, HV, G, NY, 1 if cu_seqlens is None else NSEQ, T // BT + 1, BT.bit_length() - 1, SEG, NSEG")
            else:
                rows = "NC, 1" if k.parallel else "NSEG, SEG"
                marks = ", _rows(T, BT, cu_seqlens)" if any(name.startswith("mark_") for name, _ in p.states) else ""
                args.append(f"T, HV, G, NY, {rows}, BT.bit_length() - 1{', NC' if marks and k.parallel else marks}")
        elif k.kind == "scan":
            lines.append(f"NY = {tile}")
            marks = ", _rows(T, BT, cu_seqlens)" if any(name.startswith("mark_") for name, _ in p.states) else ""
            args.append(f"T, HV, G, NY, NSEG, SEG{marks}" + (f", triton.cdiv({rows_of(k)}, B{rows_of(k)})" if rows_of(k) else ""))
        elif k.kind == "step":
            lines += [f"NY = {tile}"] if k.tile else []
            shared = not k.late and any(x.late for x in self.plan.step)
            if shared:
                tiled = ["NY"] * any(k.tile not in ("", *s.dims) for s in k.states)
                sharing = " * ".join([*tiled, *dict.fromkeys("G" if s.head else "HV" for s in k.states if s.head != self.top)])
                lines.append(f"apart = {sharing} > 1  # programs that share a state leave it to a launch after")
            args.append(f"{heads}, {'1' if k.late else 'G'}" + ", NY" * bool(k.tile) + ", apart" * shared)
        elif k.kind == "chunks":
            lines.append(f"NY, NC = {tile}, _rows(T, BT, cu_seqlens)")
            args.append("T, HV, G, NY, NC, BT.bit_length() - 1")
        else:
            length = "1" if step else "T"
            lines.append("NC = 1" if step else "NC = _rows(T, BT, cu_seqlens)")
            lines += [f"NY = {tile}"] if k.tile else []
            shares = sorted({b.partial for b in self.loads(k) if b.partial})
            args.append(
                f"{length}, {heads}, {'1' if k.name.startswith('prepare') else 'G'}, NC{', NY' if k.tile else ''}"
                + "".join(f", triton.cdiv({d}, B{d})" for d in shares)
            )
        if k.kind != "step":
            args.append("BT")
        if p.dims:
            args.append(", ".join(p.dims))
            rows = rows_of(k) if k.kind == "scan" else ""
            blocks = [block if d == k.tile else f"B{d}" if d == rows else f"_block({d})" for d in p.dims]
            args.append(", ".join([*blocks, *([f"G{rows}"] if rows else [])]))
        if p.sizes:
            args.append(", ".join(p.sizes))
        args.append("_DTYPES[dtype], _precision(dtype)" + (", _precision(torch.float32)" if p.exactly else ""))
        flags = ["slots is not None" if k.kind == "step" else "False" if step else "cu_seqlens is not None"]
        if k.runs:
            flags.append(f"{'T' if k in self.plan.borders else 'BT' if k.parallel else 'SEG * BT'} * widest >= 2**31")
            flags += [self.flag(self.cut_name(name) if sweep else name) for name, _ in p.states if not name.startswith("mark_")]
        args.append(", ".join(flags))
        assert len(args) == len(p.signature), (k.name, args, p.signature)
        return lines, list(zip(p.signature, args, strict=True)), grid

    def roles(self, kernels: list[Kernel]) -> list[str]:
        """Prints the launch whose roles ``kernels`` are."""
        lines: list[str] = []
        given: dict[str, str] = {}
        grid = ""
        for k in kernels:
            p = self.done[k]
            assert isinstance(p, Printed)
            made, args, grid = self.call(k, p, step=False)
            lines += [x.replace("NY =", f"NY_{k.tile} =") if x.startswith("NY =") else x for x in made]
            given = merge_arguments(given, p, args)
        grid = grid.replace("NY", "(" + " + ".join(f"NY_{k.tile}" for k in kernels) + ")")
        order = sorted(given, key=lambda name: "constexpr" in name)
        warps, stages = (f"max({', '.join(f'{what}_{k.name}' for k in kernels)})" for what in ("warps", "stages"))
        return lines + self.calls(kernels[0].launch, grid, [given[n] for n in order], warps, stages)

    def token(self, name: str) -> bool:
        """Tells whether a tensor has batch and time."""
        if name.startswith("total_"):
            return False
        if name in self.buffers and not any(t.name == name for t in self.tensors):
            return self.buffers[name].token
        return all(t.token for t in self.tensors if t.name == name)

    def segments(self, kernels: tuple[Kernel, ...], tensors: tuple[Tensor, ...]) -> list[str]:
        """Prints how a pass cuts its scans; ``tensors`` are those with tokens that it is given."""
        sweeps = [k for k in kernels if k.kind == "sweep"]
        held = [d for k in kernels for d in self.kernel_dims(k)]
        own = f"HV * max({', '.join(['BT', *dict.fromkeys(held)])})"
        marks = [" * ".join(self.states[h.carry.state].dims) or "1" for k in kernels for h in k.holds if h.mark or h.met]
        own = ", ".join([own, *(f"triton.cdiv({size}, BT)" for size in dict.fromkeys(marks))])
        wide = f"widest = max({own}, *(x.stride(1) for x in ({', '.join(t.name for t in tensors)},)))  # elements a token of any tensor"
        if not self.plan.borders:
            return [wide, "SEG, NSEG, cut = _cut(max(1, triton.cdiv(T, BT)), BT, T, cu_seqlens)"]
        tiles = f" * triton.cdiv({sweeps[0].tile}, B{sweeps[0].tile})" if sweeps[0].tile else ""
        call = f"NSEQ * HV{tiles}, triton.cdiv(T, BT), _processors(device.index or 0), (2**31 - 1) // (BT * widest)"
        call += ", tuned.get('segment', 0)"
        return [wide, f"SEG, NSEG, cut = _cut(FORM or _segments({call})[0], BT, T, cu_seqlens)"]

    def borders(self, states: tuple[State, ...]) -> list[Kernel]:
        """Lists the launches that store ``states`` at segments' borders."""
        return [k for k in self.plan.borders if k.holds[0].carry.state in {s.name for s in states}]

    def cut(self, states: tuple[State, ...]) -> list[str]:
        """Prints the launches that store states at the segments' borders."""
        lines: list[str] = []
        for k in self.borders(states):
            state = self.states[k.holds[0].carry.state]
            shape = ", ".join(["B * NSEG", *(["HV"] if self.top else []), *state.dims])
            lines.append(f"border_{state.name} = torch.empty(({shape},), dtype=torch.float32, device=device)")
            lines += self.launch(k, step=False)
            source = k.holds[0].source
            lines.append(f"{source.replace('initial', 'start').replace('dfinal', 'after')} = border_{state.name}")
        return ["if cut:", *(f"    {x}" for x in lines)] if lines else []

    def pointer(self, name: str) -> str:
        """Prints the tensor behind a state's pointer; any tensor stands in for one that is absent."""
        return f"{name} if {name} is not None else {self.r.inputs[0].name}" if not name.startswith(("state_", "next_", "mark_")) else name

    def cut_name(self, name: str) -> str:
        """Names what a sweep starts from: a given state, or a segment's border."""
        return (
            name.replace("initial_", "start_")
            if name.startswith("initial_")
            else name.replace("dfinal_", "after_")
            if name.startswith("dfinal_")
            else name
        )

    def flag(self, name: str) -> str:
        """Prints whether a state's pointer is there."""
        return f"{name} is not None"

    def unpack(self, group: str, prefix: str, states: tuple[State, ...]) -> list[str]:
        """Prints the optional states of one role as contiguous tensors."""
        names = ", ".join(f"{prefix}_{s.name}" for s in states)
        none = ", ".join("None" for _ in states)
        return [f"{names}, = (x.contiguous() for x in {group}) if {group} is not None else ({none},)"]

    def state_shape(self, s: State, wide: bool) -> str:
        """Prints the shape of a state."""
        heads = [] if not s.head and not (wide and self.top) else ["HV" if wide or s.head == self.top else "HV // G"]
        return f"({', '.join(['NSEQ', *heads, *s.dims])},)"

    def forward(self, done: dict[Kernel, Printed | str]) -> str:
        """Prints triton_forward."""
        self.done = done
        causal = all(s.causal for s in self.r.states)
        lines = (
            self.sizes(step=False)
            + self.tiles([*self.borders(self.r.states), *self.plan.forward], "forward")
            + self.segments(self.plan.forward, self.r.inputs)
        )
        lines += self.unpack("initial_states", "initial", self.r.states)
        lines += [f"start_{s.name} = initial_{s.name}" for s in self.r.states]
        for s in self.r.states:
            empty = f"torch.empty({self.state_shape(s, False)}, dtype=torch.float32, device=device)"
            lines.append(f"final_{s.name} = {empty} if output_final_state else None" if causal else f"final_{s.name} = None")
        cut = False
        for k in self.plan.forward:
            if k.kind == "sweep" and not cut:
                lines += self.cut(self.r.states)
                cut = True
            lines += self.launch(k, step=False)
        outs = ", ".join(n for n, _ in self.r.outputs) + ","
        finals = ", ".join(f"final_{s.name}" for s in self.r.states) + ","
        saved = "".join(f"{b.name}, " for b in self.plan.saved)
        lines.append(f"return ({outs}), ({finals}) if output_final_state else None, ({saved})")
        return _function(
            "triton_forward(inputs, params, scale, initial_states, output_final_state, cu_seqlens)", "Launches the forward.", lines
        )

    def backward(self, done: dict[Kernel, Printed | str]) -> str:
        """Prints triton_backward."""
        self.done = done
        lines = self.sizes(step=False) + self.tiles([*self.plan.borders, *self.plan.backward], "backward")
        lines += self.unpack("initial_states", "initial", self.r.states)
        lines += self.unpack("d_final_states", "dfinal", self.r.states)
        lines += [f"start_{s.name}, after_{s.name} = initial_{s.name}, dfinal_{s.name}" for s in self.r.states]
        lines.append(f"{', '.join(n for n, _ in self.r.outputs)}, = map(_unit, outputs)")
        lines.append(f"{', '.join(t.name for t in self.a.cotangents)}, = map(_unit, d_outputs)")
        for t in (t for t in self.a.cotangents if t.head != self.top):  # else each head of a group would send it back
            lines.append(f"{t.name}, narrow = {t.name}.new_zeros(B, T, HV, *{t.name}.shape[{2 + bool(t.head)}:]), {t.name}")
            lines.append(f"{t.name}[:, :, {'::G' if t.head else '0'}] = narrow")
        lines += self.segments(self.plan.backward, (*self.r.inputs, *self.a.cotangents))
        lines.append("closed = cut or d_final_states is not None")
        if self.plan.saved:
            lines.append(f"{', '.join(b.name for b in self.plan.saved)}, = saved")
        for s in (s for s in self.a.states if s.name != f"d{s.of}"):
            lines.append(f"dfinal_{s.name[1:]} = after_{s.name[1:]} = dfinal_{s.of}")
        for s in self.r.states:
            empty = f"torch.empty({self.state_shape(s, True)}, dtype=torch.float32, device=device)"
            lines.append(f"dinitial_{s.name} = {empty} if initial_states is not None else None")
        cut = False
        for k in self.plan.backward:
            if k.kind == "sweep" and not cut:
                lines += self.cut(tuple(self.states.values()))
                cut = True
            lines += self.launch(k, step=False)
        grads: list[str] = []
        params: list[str] = []
        for t in self.tensors:
            name = f"d{t.name}"
            if not t.token:
                lines.append(f"{name} = {name}.sum((0, 1))")
            axis = 2 if t.token else 0
            lines += self.narrow(name, t.head, axis, f"{t.name}.dtype")
            (grads if t.token else params).append(name)
        initial = []
        for s in self.r.states:
            lines += [f"if dinitial_{s.name} is not None:"] + [
                f"    {x}" for x in self.narrow(f"dinitial_{s.name}", s.head, 1, "torch.float32")
            ]
            if lines[-1].startswith("if "):
                lines.pop()
            initial.append(f"dinitial_{s.name}")
        given = f"({', '.join(initial)},) if initial_states is not None else None"
        lines.append(f"return ({_items(grads)}), ({_items(params)}), {given}")
        return _function(
            "triton_backward(inputs, params, scale, initial_states, saved, outputs, final_states, d_outputs, d_final_states, cu_seqlens)",
            "Launches the backward: a gradient for every input, param and initial state.",
            lines,
        )

    def narrow(self, name: str, head: str, axis: int, dtype: str) -> list[str]:
        """Prints the sum over the heads that share one, where the gradient's head is narrower than the program's."""
        if head == self.top:
            return [] if dtype == "torch.float32" else [f"{name} = {name}.to({dtype})"]
        if head:
            return [f"{name} = ({name}.unflatten({axis}, (HV // G, G)).sum({axis + 1}) if G > 1 else {name}).to({dtype})"]
        return [f"{name} = {name}.sum({axis}).to({dtype})"]

    def step(self, done: dict[Kernel, Printed | str]) -> str:
        """Prints triton_step."""
        self.done = done
        lines = self.sizes(step=True) + self.tiles(list(self.plan.step), "step")
        lines += [
            f"{', '.join(f'state_{s.name}' for s in self.r.states)}, = states",
            f"{', '.join(n for n, _ in self.r.outputs)}, = outputs",
            "if slots is not None:",
            *(f"    {n}.zero_()  # what a padding row gives" for n, _ in self.r.outputs),
        ]
        for k in self.plan.step:
            lines += self.launch(k, step=True)
            if k.kind == "tokens":
                lines += [f"{s.buffer.name} = {s.buffer.name}[:, 0]" for s in k.stores]
        doc = "Launches one decode step: writes the outputs, and advances the states, or those that the slots name, in place."
        return _function("triton_step(inputs, params, scale, states, slots, outputs)", doc, lines)


def _printed(function: Callable[..., object]) -> str:
    """Returns the source of a function that generated files carry, under a name of theirs."""
    return inspect.getsource(function).replace("def ", "def _", 1).rstrip()


def _items(names: list[str]) -> str:
    return ", ".join(names) + ("," if names else "")


def _whole(size: Expr) -> str:
    return show(size).replace("/", "//")


def _function(signature: str, doc: str, lines: list[str]) -> str:
    return "\n".join([f"def {signature}:", f'    """{doc}"""', *(f"    {x}" for x in lines)])
