"""Prints sweeps of one direction as roles of one launch: one signature for all, and a kernel that gives each program its role.

A role's kernel is printed as any other; here its parameters are taken apart by name. Those that mean another thing in each role, the
number of its programs and the blocks of its whole dims, have a name for the role.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lagen.emit.kernels import Printed
from lagen.emit.templates import environment


def merge_arguments(given: dict[str, str], p: Printed, args: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Returns the arguments of a launch by parameter, with those of one more role."""
    merged = dict(given)
    own = _own(p)
    for parameters, arg in args:
        for one, value in _apart(parameters, arg):
            name, value = _renamed(one, own), own.get(value, value)
            assert merged.setdefault(name, value) == value, f"{name} is {merged[name]} and {value}"
    return merged


def print_roles(launch: str, roles: Sequence[Printed]) -> str:
    """Prints the kernel ``launch``, whose roles these kernels are."""
    signature: dict[str, None] = {}
    parts, start = [], ""
    for p in roles:
        own, arguments = _own(p), []
        for line in p.signature:
            signature |= dict.fromkeys(_renamed(one, own) for one, _ in _apart(line, line))
            arguments.append(", ".join(own.get(n, n) for n in _names(line)))
        programs = f"NY_{p.kernel.tile}"
        end = f"{start} + {programs}" if start else programs
        less = f"({start})" if " " in start else start
        parts.append({"name": p.kernel.name, "programs": programs, "start": less, "end": end, "arguments": arguments})
        start = end
    order = sorted(signature, key=lambda name: "constexpr" in name)
    doc = f"The programs of {' and '.join(p.kernel.name for p in roles)}, side by side."
    template = environment().get_template("triton/roles.py.j2")
    return template.render(name=launch, signature=_lines(order), roles=parts, doc=doc)


def _own(p: Printed) -> dict[str, str]:
    """Names for one role what means another thing in each."""
    return {"NY": f"NY_{p.kernel.tile}"} | {f"B{d}": f"B{d}_whole" for d in p.dims if d != p.kernel.tile}


def _names(line: str) -> list[str]:
    return [x.partition(":")[0] for x in line.split(", ")]


def _apart(parameters: str, arg: str) -> list[tuple[str, str]]:
    """Takes a line of parameters apart, each with what it is given; a tensor and its strides stay together."""
    ones = parameters.split(", ")
    values = [x.strip() for x in re.split(r",(?![^()]*\))", arg)]
    return list(zip(ones, values, strict=True)) if len(ones) == len(values) and f"{ones[0]}_sb" not in ones else [(parameters, arg)]


def _renamed(line: str, own: dict[str, str]) -> str:
    return ", ".join(own.get(name, name) + part[len(name) :] for part, name in zip(line.split(", "), _names(line), strict=True))


def _lines(parameters: Sequence[str]) -> list[str]:
    """Puts parameters in lines: a tensor with its strides in one of its own, the others as many as fit."""
    lines: list[str] = []
    open_ = False
    for one in parameters:
        alone = ", " in one
        if open_ and not alone and len(lines[-1]) + len(one) < 100:
            lines[-1] += f", {one}"
        else:
            lines.append(one)
        open_ = not alone
    return lines
