"""The command line. Heavy imports stand inside the commands, so that ``lagen --help`` answers at once.

Exit codes: 0 done; 1 a check failed, or a kernel could not be launched; 2 a mistake in the call or in a spec.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from functools import update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import lagen
from lagen import data
from lagen.cli_tuned import tuned

if TYPE_CHECKING:
    from lagen.ir.variant import Variant

FAILED, MISTAKEN = 1, 2
STAGES = ["variant", "recurrence", "adjoint", "chunk", "plan", "source", "tuned", "all"]
"""What explain shows: lagen.explain.STAGES, which is too heavy to import for --help."""


class Commands(click.Group):
    """A group that tells users of their mistakes without a traceback."""

    def invoke(self, context: click.Context) -> Any:
        """Runs the chosen command; ends with 2 where a spec, a target or a file name is at fault."""
        try:
            return super().invoke(context)
        except BrokenPipeError:  # whoever read our output has seen enough: click's affair
            raise
        except _mistakes() as error:
            # A message of the system (a file that is not there) says itself which file; the others are written for the user.
            click.echo(str(error), err=True)
            context.exit(MISTAKEN)


def _mistakes() -> tuple[type[Exception], ...]:
    """Returns the errors that are the user's: a file that is not there, and those of the rooms imported so far."""
    rooms = {"lagen.spec.mistakes": "SpecErrors", "lagen.targets.target": "UnknownTarget", "lagen.runtime.build": "BuildRefused"}
    found = [getattr(sys.modules[room], name, None) for room, name in rooms.items() if room in sys.modules]
    return (OSError, *(error for error in found if isinstance(error, type)))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(lagen.__version__, prog_name="lagen")
def main() -> None:
    """A compiler for linear attention: from a recurrence in a spec file to a PyTorch operator.

    SPEC is the path of a YAML file, or the name of a shipped spec (`lagen list`).
    """


main.add_command(tuned)


def _path(text: str) -> Path:
    """Finds a spec by path or by shipped name; raises click.BadParameter."""
    path = Path(text)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise click.BadParameter(f"no file {text}")
        return path
    names = [p.stem for p in data.specs()]
    if text not in names:
        raise click.BadParameter(f"{text!r} is neither a file nor a shipped spec; there are {', '.join(names)}")
    return data.spec(text)


def _specs(many: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds the argument SPEC to a command, which gets ``paths`` (or ``path``)."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def wrapped(spec: tuple[str, ...] | str, **options: Any) -> None:
            if isinstance(spec, str):
                command(path=_path(spec), **options)
            else:
                command(paths=[_path(s) for s in spec] or list(data.specs()), **options)

        argument = click.argument("spec", nargs=-1 if many else 1, metavar="[SPEC]..." if many else "SPEC")
        return argument(update_wrapper(wrapped, command))

    return decorate


def _read(path: Path, strict: bool = False, tell: bool = False) -> Variant:
    """Reads a spec; with ``tell`` its warnings go to standard error."""
    from lagen.spec.read import read, warnings_of

    variant = read(path, strict=strict)
    for warning in warnings_of(variant) if tell else ():
        click.echo(warning.render(variant.source, variant.path), err=True)
    return variant


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))


def _end(passed: bool) -> None:
    click.get_current_context().exit(0 if passed else FAILED)


def _sizes(context: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """Reads NAME=SIZE; raises click.BadParameter."""
    for text in texts:
        if not re.fullmatch(r"[A-Za-z]\w*=[1-9]\d*", text):
            raise click.BadParameter(f"{text!r}: write NAME=SIZE, as in --dim M=64")
    return tuple((name, int(size)) for name, _, size in (text.partition("=") for text in texts))


@main.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects.")
def list_specs(as_json: bool) -> None:
    """List the shipped specs."""
    from lagen.explain import family
    from lagen.passes.canonicalise import canonicalise

    rows = []
    for path in data.specs():
        variant = _read(path)
        rows.append({"name": variant.name, "family": family(canonicalise(variant)), "doc": variant.doc, "path": str(path)})
    if as_json:
        return _print_json(rows)
    from lagen.cli_table import table

    table(("name", "family", "paper"), [(r["name"], r["family"], r["doc"]) for r in rows])


@main.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def new(name: str, force: bool) -> None:
    """Write NAME.yaml, a commented spec to start from."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise click.BadParameter(f"{name!r}: an operator's name is lower-case letters, digits and underscores", param_hint="NAME")
    path = Path(f"{name}.yaml")
    if path.exists() and not force:
        raise click.UsageError(f"{path} is there already; --force replaces it")
    path.write_text((data.templates() / "spec.yaml").read_text().replace("NAME", name))
    click.echo(f"wrote {path}; next: lagen check {path}")


@main.command()
def schema() -> None:
    """Print the JSON schema of a spec, for editors."""
    from lagen.spec.schema import schema as make_schema

    _print_json(make_schema())


@main.command()
@_specs()
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="The package's folder.")
@click.option("--force", is_flag=True, help="Build over a folder that lagen did not write.")
@click.option("--strict", is_flag=True, help="Refuse what is only warned of.")
@click.option("--target", type=click.Choice(["cpu"]), help="Compile the CPU's C++ into the cache now, not at the first call.")
def build(paths: list[Path], out: Path, force: bool, strict: bool, target: str | None) -> None:
    """Write an importable package with one operator a spec."""
    from lagen.runtime.build import build as write_package

    variants = [_read(path, strict, tell=True) for path in paths]
    for written in write_package(variants, out, force=force):
        click.echo(f"wrote {written}")
    if target:
        from lagen.runtime.prebuild import prebuild

        for variant in variants:
            made = prebuild(variant)
            click.echo(f"compiled {made}" if isinstance(made, Path) else f"{variant.name} runs as torch code on the CPU: {made.reason}")
    click.echo(f"from {out.name} import {', '.join(v.name for v in variants)}")


@main.command()
@_specs()
@click.option("--strict", is_flag=True, help="Refuse what is only warned of.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects.")
@click.option("--backend", type=click.Choice(["triton", "cpp", "torch", "oracle"]), help="What suits the device where not given.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda; on the CPU, triton's kernels are interpreted.")
@click.option("--thorough", is_flag=True, help="More lengths and larger dims.")
@click.option("--cases", "every", is_flag=True, help="Show every case, not every law.")
def check(paths: list[Path], strict: bool, as_json: bool, backend: str | None, device: str, thorough: bool, every: bool) -> None:
    """Test every law on each SPEC (all shipped ones by default) against the float64 oracle."""
    if backend == "triton" and device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    from lagen.cli_check import check_all

    _end(check_all([_read(p, strict, tell=True) for p in paths], as_json, backend, device, thorough, every))


@main.command()
@_specs(many=False)
@click.option("--stage", default="all", show_default=True, type=click.Choice(STAGES), help="What to show.")
@click.option("--strict", is_flag=True, help="Refuse what is only warned of.")
def explain(path: Path, stage: str, strict: bool) -> None:
    """Show what the compiler makes of SPEC, stage by stage, and why."""
    from lagen.explain import explain as describe

    click.echo(describe(_read(path, strict), stage))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects.")
def targets(as_json: bool) -> None:
    """List the devices that kernels can be compiled for, with their numbers and where those come from."""
    from lagen.cli_targets import show

    show(as_json)


@main.command("compile")
@_specs()
@click.option("--target", "targets", multiple=True, default=["cuda:90"], show_default=True, help="cuda:80, hip:gfx942, ...; may repeat.")
@click.option("--K", "k", default=128, show_default=True, type=click.IntRange(1), help="Size of every dim but V.")
@click.option("--V", "v", default=128, show_default=True, type=click.IntRange(1), help="Size of the dim V.")
@click.option("--B", "b", default=4, show_default=True, type=click.IntRange(1), help="Batch.")
@click.option("--T", "t", default=4096, show_default=True, type=click.IntRange(1), help="Tokens.")
@click.option("--H", "h", default=16, show_default=True, type=click.IntRange(1), help="Heads.")
@click.option("--dtype", default="bf16", show_default=True, type=click.Choice(["bf16", "fp16", "fp32"]), help="Of inputs and params.")
@click.option("--chunk", type=click.IntRange(1), help="Chunk size; the spec's default where not given.")
@click.option("--dim", "dims", multiple=True, metavar="NAME=SIZE", callback=_sizes, help="Size of one dim by name; may repeat.")
@click.option("--states", is_flag=True, help="With initial and final states.")
@click.option("--sequences", type=click.IntRange(0), default=0, help="So many packed sequences of B * T tokens; a step over a pool.")
@click.option("--timeout", default=180.0, show_default=True, help="Seconds for one kernel.")
@click.option("--workers", type=click.IntRange(1), help="Kernels at a time; one a core where not given.")
@click.option("--fill", is_flag=True, help="Keep the machine code in Triton's own cache (TRITON_CACHE_DIR), for the device's first call.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects.")
def compile_specs(paths: list[Path], targets: tuple[str, ...], as_json: bool, **shape: Any) -> None:
    """Compile every kernel of each SPEC for a device that need not be here; report what they need and take.

    Registers, spills, shared memory, instruction mix, occupancy, bytes over the least that must move, and a modelled time with its bound.
    """
    from lagen.cli_compile import compile_all
    from lagen.targets.target import find

    _end(compile_all([_read(p) for p in paths], [find(t) for t in targets], as_json, **shape))


@main.command()
@_specs(many=False)
@click.option("--T", "t", default="1024:16384", show_default=True, help="Lengths: a range by doubling, or a list, 1024,3000.")
@click.option(
    "--against",
    default="installed",
    show_default=True,
    help="Peers: sdpa (softmax attention), torch (this operator's torch code), transformers, fla, mamba_ssm; installed: all that are.",
)
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu"]), help="Where to run.")
@click.option("--H", "h", default=8, show_default=True, type=click.IntRange(1), help="Heads.")
@click.option("--size", default=64, show_default=True, type=click.IntRange(1), help="Of K, V and every other dim.")
@click.option("--repeats", default=7, show_default=True, type=click.IntRange(1), help="Rounds, everyone once a round.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--dtype", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16", "fp16"]))
@click.option("--json", "as_json", is_flag=True, help="Print one object.")
@click.option("--plot", "png", type=click.Path(dir_okay=False, path_type=Path), help="Draw time against T into a PNG (wants matplotlib).")
def bench(
    path: Path,
    t: str,
    against: str,
    device: str,
    h: int,
    size: int,
    repeats: int,
    threads: int,
    dtype: str,
    as_json: bool,
    png: Path | None,
) -> None:
    """Time the operator of SPEC against its peers: medians in turn, growth with T, memory, shares of the machine's rates."""
    from lagen.cli_bench import run

    run(_read(path, tell=True), t, against, h, size, repeats, threads, dtype, as_json, png)


@main.command()
@_specs()
@click.option("--device", default="cpu", show_default=True, help="cpu, or a target: measured where it is here, else modelled.")
@click.option("--budget", default="5m", show_default=True, help="Time for all searches together: 90s, 5m, 2h.")
@click.option("--trials", type=click.IntRange(1), help="Trials of each search, where fewer than the budget allows.")
@click.option("--dtype", "dtypes", multiple=True, default=["fp32"], show_default=True, type=click.Choice(["bf16", "fp16", "fp32"]))
@click.option("--K", "k", default=64, show_default=True, type=click.IntRange(1), help="Size of every dim but V.")
@click.option("--V", "v", default=64, show_default=True, type=click.IntRange(1), help="Size of the dim V.")
@click.option("--dim", "dims", multiple=True, metavar="NAME=SIZE", callback=_sizes, help="Size of one dim by name; may repeat.")
@click.option("--B", "b", default=1, show_default=True, type=click.IntRange(1), help="Batch.")
@click.option("--T", "t", default=2048, show_default=True, type=click.IntRange(1), help="Tokens.")
@click.option("--H", "h", default=8, show_default=True, type=click.IntRange(1), help="Heads.")
@click.option("--pass", "passes", multiple=True, type=click.Choice(["forward", "backward", "step"]), help="Only these; may repeat.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Of a measured call on the CPU.")
@click.option("--storage", default="", help="An RDB or grpc://HOST:PORT that several tuners share; a journal file where not given.")
@click.option("--timeout", default=120.0, show_default=True, help="Seconds for one trial.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(3), help="Timings of each contestant in a trial.")
@click.option("--write", is_flag=True, help="Keep what was found in the user's cache, for calls to use.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Keep it in this folder instead.")
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Draw the search (wants matplotlib).")
@click.option("--seed", type=int, help="Of the sampler.")
def tune(
    paths: list[Path],
    device: str,
    budget: str,
    trials: int | None,
    dtypes: tuple[str, ...],
    k: int,
    v: int,
    dims: tuple[tuple[str, int], ...],
    b: int,
    t: int,
    h: int,
    passes: tuple[str, ...],
    threads: int,
    storage: str,
    timeout: float,
    rounds: int,
    write: bool,
    out: Path | None,
    png: Path | None,
    seed: int | None,
) -> None:
    """Search the fastest config of each SPEC for a device: checked against the oracle, timed beside the defaults, kept on disk.

    A second run with the same arguments goes on where the first one ended, however it ended.
    """
    from lagen.cli_tune import folder, seconds, tune_all
    from lagen.tune.search import Budget

    spent = Budget(trials or 1 << 30, seconds(budget))
    sizes = {"K": k, "V": v, **dict(dims)}
    where = folder(out, write)
    variants = [_read(p) for p in paths]
    _end(tune_all(variants, device, dtypes, sizes, (b, t, h), threads, spent, storage, timeout, rounds, where, png, passes, seed))


@main.command()
@click.option("--steps", default=400, show_default=True, type=click.IntRange(1), help="Training steps.")
@click.option("--seed", default=0, show_default=True)
@click.option("--prompt", default="The ", show_default=True)
def demo(steps: int, seed: int, prompt: str) -> None:
    """Train a small character model on the operator of gla, then generate with its decode step."""
    from lagen.demo import run

    _end(run(steps, seed, prompt))
