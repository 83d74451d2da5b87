"""The JSON schema of a spec file, for editors. What a line may hold is said in words; the reader has the last word."""

from __future__ import annotations

_NAME = "^[A-Za-z][A-Za-z0-9_]*$"
_DIMS = {
    "type": "array",
    "items": {"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9_]*$"},
    "maxItems": 3,
    "description": "the head dim (H or HV) first, if any, then at most two more; [] is one number a token",
}
_CHUNK = {"enum": [16, 32, 64, 128, 256]}


def schema() -> dict[str, object]:
    """This function returns the JSON schema (draft 2020-12) of a spec file."""

    def tensors(description: str) -> dict[str, object]:
        return {"type": "object", "patternProperties": {_NAME: _DIMS}, "additionalProperties": False, "description": description}

    def lines(key: str, description: str) -> dict[str, object]:
        line = {"type": ["string", "number"], "description": "an expression; `-> F` at its end names a dim that it makes"}
        return {"type": "object", "patternProperties": {key: line}, "additionalProperties": False, "description": description}

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lagen spec",
        "description": "A variant of linear attention, as its paper states it: per token and head, one line per state and output.",
        "type": "object",
        "required": ["name", "inputs", "recurrence"],
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "pattern": _NAME, "description": "the operator's name, a Python identifier"},
            "doc": {"type": "string", "description": "one line, with the paper; quoted where it holds a colon"},
            "inputs": tensors("tensors with batch and time in front: [B, T, *dims]"),
            "params": tensors("tensors without batch and time"),
            "define": lines(r"^[A-Za-z_]\w*(\s*\([^()]*\))?$", "token-wise names and functions, in order"),
            "assume": {
                "type": "array",
                "items": {"type": "string"},
                "description": "comparisons that the compiler may rely on, such as g <= 0",
            },
            "recurrence": lines(
                r"^[A-Za-z_]\w*$",
                "a line that reads its own past S[t-1] is a state, one that begins with an underscore an abbreviation, any other an output",
            ),
            "chunk": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"default": _CHUNK, "sizes": {"type": "array", "items": _CHUNK, "minItems": 1}},
                "description": "the chunk sizes to consider, and the one to start from",
            },
            "causal": {"type": "boolean", "description": "false: a line that is read as X[t] is the sum over all tokens"},
            "init": {
                "type": "object",
                "additionalProperties": {"type": "number"},
                "description": "a state's value before the first token, where it is not 0",
            },
        },
    }
