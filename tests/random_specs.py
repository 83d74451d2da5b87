"""Random specs of the diagonal-decay families: a recipe per spec, its text, and hypothesis strategies that draw recipes.

A recipe is a choice along each axis of the family (decay, feature map, read, normaliser, skip, heads, scale); axes that exclude each
other (a normaliser under a per-value decay, a ratio whose first denominator is empty) are reconciled by ``Recipe.settled``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from hypothesis import strategies as st

DECAYS = ("none", "head", "scalar", "key", "value", "key and value", "sigmoid", "softplus")
MAPS = {
    "same": "x",
    "silu": "silu(x)",
    "elu": "elu(x) + 1",
    "relu": "relu(x) + 0.01",
    "softmax": "softmax(x)",
    "unit": "l2norm(x)",
    "signs": "softmax(concat(x, -x)) -> F",
    "taylor": "taylor2(K ** -0.25 * x) -> F",
    "square": "quad(0.5 * x) -> F",
    "random": "exp(x @ W - sum(x * x))",
}
POSITIVE = ("elu", "relu", "softmax", "signs", "random")
RESIZED = ("signs", "taylor", "square", "random")
READS = ("inclusive", "exclusive", "bonus")
NORMS = ("none", "ratio", "guarded")
SKIPS = ("none", "D", "gated")
HEADS = ("H", "values", "queries", "none")


@dataclass(frozen=True)
class Recipe:
    """One choice along each axis."""

    decay: str = "none"
    map: str = "same"
    read: str = "inclusive"
    norm: str = "none"
    skip: str = "none"
    heads: str = "H"
    scaled: bool = False

    def settled(self) -> Recipe:
        """Returns the nearest recipe whose spec is legal and well conditioned."""
        out = self
        if out.decay in ("value", "key and value"):
            out = replace(out, norm="none")
        if out.map in RESIZED:
            out = replace(out, read="inclusive" if out.read == "bonus" else out.read)
            if out.decay in ("key", "key and value", "sigmoid"):
                out = replace(out, decay="scalar")
        if out.norm == "ratio" and (out.map not in POSITIVE or out.read != "inclusive"):
            out = replace(out, norm="guarded")
        return out

    @property
    def name(self) -> str:
        """Returns the spec's name: a Python identifier."""
        return "_".join(str(getattr(self, f.name)).lower() for f in fields(self)).replace(" ", "_")

    def text(self) -> str:
        """Writes the spec."""
        h = "" if self.heads == "none" else "H"
        q_head, v_head = ("HV" if self.heads == "queries" else h), ("HV" if self.heads == "values" else h)
        resized = self.map in RESIZED
        inputs = {"q": (q_head, "K"), "k": (h, "K"), "v": (v_head, "V")}
        params: dict[str, tuple[str, ...]] = {}
        defines, facts = [f"phi(x): {MAPS[self.map]}"], []
        decay = ""
        match self.decay:
            case "head":
                params["slope"], decay = (v_head,), "exp(-slope) * "
                facts.append("slope >= 0")
            case "scalar":
                inputs["g"], decay = (v_head,), "exp(g) * "
                facts.append("g <= 0")
            case "key":
                inputs["g"], decay = (h, "K"), "exp(g) * "
                facts.append("g <= 0")
            case "value":
                inputs["c"], decay = (v_head, "V"), "exp(c) * "
                facts.append("c <= 0")
            case "key and value":
                inputs["g"], inputs["c"], decay = (h, "K"), (v_head, "V"), "exp(g) * exp(c) * "
                facts += ["g <= 0", "c <= 0"]
            case "sigmoid":
                inputs["f"], decay = (h, "K"), "sigmoid(f) * "
            case "softplus":
                inputs["dt"], params["A_log"], decay = (v_head,), (v_head,), "exp(-exp(A_log) * softplus(dt)) * "
        if self.decay == "key and value":
            past = "exp(g) * (exp(c) * S[t-1])"
        else:
            past = f"{decay}S[t-1]"
        if self.map == "random":
            params["W"] = (h, "K", "M")
        if self.read == "bonus":
            params["u"] = (h, "K")
        lines = [f"S: {past} + outer(phi(k), v)"]
        read, total = {
            "inclusive": ("phi(q) @ S[t]", "phi(q) @ z[t]"),
            "exclusive": ("phi(q) @ S[t-1]", "phi(q) @ z[t-1]"),
            "bonus": ("phi(q) @ (S[t-1] + outer(u * phi(k), v))", "phi(q) @ (z[t-1] + u * phi(k))"),
        }[self.read]
        out = f"({read})"
        if self.norm != "none":
            lines.append(f"z: {decay}z[t-1] + phi(k)")
            out += f" / ({total})" if self.norm == "ratio" else f" / max(abs({total}), 1)"
        if self.scaled:
            out = f"scale * ({out})" if self.norm != "none" else f"scale * {out}"
        if self.skip == "D":
            params["D"] = (v_head,)
            out += " + D * v"
        if self.skip == "gated":
            inputs["m"] = (v_head, "V")
            out = f"silu(m) * ({out})"
        lines.append(f"o: {out}")

        def block(title: str, rows: list[str]) -> str:
            return f"{title}:\n" + "".join(f"  {r}\n" for r in rows) if rows else ""

        def shapes(table: dict[str, tuple[str, ...]]) -> list[str]:
            return [f"{n}: [{', '.join(d for d in dims if d)}]" for n, dims in table.items()]

        assert not resized or self.read != "bonus", self
        return (
            f"name: {self.name}\ndoc: a random spec\n"
            + block("inputs", shapes(inputs))
            + block("params", shapes(params))
            + block("define", defines)
            + block("assume", [f"- {f}" for f in facts])
            + block("recurrence", lines)
            + "chunk: {default: 16, sizes: [16, 32]}\n"
        )


def recipes() -> st.SearchStrategy[Recipe]:
    """Draws settled recipes."""
    return st.builds(
        Recipe,
        decay=st.sampled_from(DECAYS),
        map=st.sampled_from(sorted(MAPS)),
        read=st.sampled_from(READS),
        norm=st.sampled_from(NORMS),
        skip=st.sampled_from(SKIPS),
        heads=st.sampled_from(HEADS),
        scaled=st.booleans(),
    ).map(Recipe.settled)
