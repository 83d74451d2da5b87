"""The words of the spec language: functions and their arguments, reserved names, and names that stand for what is out of reach."""

from __future__ import annotations

import keyword

from lagen.ir.scalar import FUNCTIONS

_NOT_SPELLED = {"add", "sub", "mul", "div", "neg", "lt", "le", "gt", "ge", "eq", "ne", "cdf", "logdecay"}

ELEMENTWISE: dict[str, int] = {name: f.arity for name, f in FUNCTIONS.items() if name not in _NOT_SPELLED}
"""Element-wise functions and how many arguments each takes. max takes one as well: then it is the row function."""

ROWS: dict[str, tuple[int, int]] = {
    "sum": (1, 1),
    "mean": (1, 1),
    "softmax": (1, 1),
    "l2norm": (1, 2),
    "rmsnorm": (2, 2),
}
"""Row functions, with the fewest and the most arguments."""

PRODUCTS = {"outer": 2, "dot": 2}
RESIZES = {"concat": 2, "taylor2": 1, "quad": 1}

KNOWN = {*ELEMENTWISE, *ROWS, *PRODUCTS, *RESIZES}
"""Every function that a spec may call without defining it."""

OPERATOR_ARGUMENTS = (
    *("scale", "initial_state", "output_final_state", "cu_seqlens", "cu_seqlens_cpu", "backend", "check"),
    *("state", "slots", "accepted"),
)

_CPP = """alignas alignof asm auto bool case catch char class const constexpr decltype default delete do double enum explicit export
extern float friend goto inline int long mutable namespace new noexcept nullptr operator private protected public register short
signed sizeof static struct switch template this throw typedef typeid typename union unsigned using virtual void volatile while""".split()

_GENERATED = ("torch", "triton", "tl", "math", "self", "forward", "backward", "step")
"""Names that generated modules use for themselves."""

OUT_OF_REACH: dict[str, str] = {
    **dict.fromkeys(("solve", "inv", "inverse", "pinv", "cg", "lstsq", "cholesky", "argmin", "minimize"), "inner solvers (MesaNet, TTT)"),
    **dict.fromkeys(("grad", "gradient", "optimizer", "momentum", "adam"), "inner training (TTT, Titans)"),
    **dict.fromkeys(("attention", "attend", "softmax_attention", "sdpa"), "softmax attention, which has no state of fixed size"),
    **dict.fromkeys(("fenwick", "loglinear", "log_linear", "hierarchical"), "log-linear attention, whose states grow with log T"),
    **dict.fromkeys(("shift", "token_shift", "roll", "conv", "conv1d", "convolution", "cumsum", "cumprod", "cummax", "prev"), ""),
}
"""What a name that nobody defined most likely stands for; empty where the layer around the operator does that work."""

INSTEAD = {
    "expand": "element-wise operations repeat over missing dims by themselves",
    "maximum": "max(a, b)",
    "minimum": "min(a, b)",
    "clamp": "min(max(x, low), high)",
    "clip": "min(max(x, low), high)",
    "pow": "x ** 2",
    "log_sigmoid": "logsigmoid(x)",
    "swish": "silu(x)",
    "square": "x ** 2",
    "log1p": "log(1 + x)",
    "expm1": "exp(x) - 1",
    "matmul": "a @ b",
    "einsum": "a @ b or outer(a, b)",
    "norm": "sqrt(sum(x ** 2)), or l2norm(x) to normalise",
    "normalize": "l2norm(x)",
    "cat": "concat(a, b)",
    "amax": "max(x)",
    "logical_and": "where(a, where(b, x, y), y)",
}
"""Names that other libraries use, and what to write."""

HEAD_DIMS = ("H", "HV")


def reserved(name: str) -> str:
    """Tells what ``name`` already means, or "" where it is free."""
    if name == "t":
        return "the token's index"
    if name == "pi":
        return "the number pi"
    if name in KNOWN:
        return "a function of the language"
    if name in OPERATOR_ARGUMENTS:
        return "an argument of the operator"
    if keyword.iskeyword(name):
        return "a keyword"
    if name in _CPP:
        return "a keyword of C++"
    if name in _GENERATED or name.startswith("lg_"):
        return "a name that generated code uses"
    return ""
