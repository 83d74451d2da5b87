"""`lagen tuned`: shows, verifies, exports and merges the entries that calls look up. Heavy imports stand inside the commands."""

from __future__ import annotations

from pathlib import Path

import click

from lagen import data


def _folder(out: Path | None) -> Path:
    from lagen.targets.tuned import user_folder

    return out or user_folder()


@click.group()
def tuned() -> None:
    """Show, verify, export and merge tuned entries: yours (LAGEN_CACHE_DIR) stand before the shipped ones."""


@tuned.command()
@click.argument("spec", nargs=-1, metavar="[SPEC]...")
@click.option("--device", default="", help="Only this one; cpu is this machine's.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects.")
def show(spec: tuple[str, ...], device: str, as_json: bool) -> None:
    """Show the entries that calls of each shipped SPEC can find, and what was passed over."""
    import json

    from lagen.cli_table import table
    from lagen.passes.canonicalise import canonicalise
    from lagen.passes.digest import digest
    from lagen.runtime.choice import processor
    from lagen.spec.read import read
    from lagen.targets.tuned import find

    rows, told = [], []
    for name in spec or tuple(p.stem for p in data.specs()):
        variant = read(data.spec(name) if name in [p.stem for p in data.specs()] else Path(name))
        found = find(variant.name, digest(canonicalise(variant)), processor() if device == "cpu" else device)
        told += [str(m) for m in found.misses]
        rows += [{"variant": variant.name, "device": e.device, **e.to_json()} for e in found.entries]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        header = ("variant", "device", "pass", "dtype", "dims", "T", "B*H", "config", "how", "us", "defaults")
        table(
            header,
            [
                (
                    *(r[k] for k in ("variant", "device", "pass", "dtype")),
                    " ".join(f"{d}={n}" for d, n in r["dims"].items()),
                    r["tokens"],
                    r["heads"],
                    " ".join(f"{n}={v}" for n, v in r["config"].items()) or "defaults",
                    r["how"],
                    r.get("time_us", ""),
                    r.get("default_us", ""),
                )
                for r in rows
            ],
        )
    for line in told:
        click.echo(f"not used: {line}", err=True)


@tuned.command()
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
def verify(folder: Path | None) -> None:
    """Check every entry of FOLDER (the shipped ones where not given): readable, of the spec's algebra, of values that may be chosen."""
    from lagen.tune.audit import audit

    count, complaints = audit(folder or data.folder("tuned"))
    for line in complaints:
        click.echo(line, err=True)
    click.echo(f"{count} entries, {len(complaints)} complaints")
    click.get_current_context().exit(1 if complaints else 0)


@tuned.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="A file; standard output where not given.")
@click.option("--from", "folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A folder other than yours.")
def export(out: Path | None, folder: Path | None) -> None:
    """Write all entries of your cache as one file, to take them elsewhere."""
    from lagen.tune.store import export as bundle

    text = bundle(_folder(folder))
    if out:
        out.write_text(text, encoding="utf-8")
    else:
        click.echo(text, nl=False)


@tuned.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Into this folder instead of yours.")
def import_(file: Path, out: Path | None) -> None:
    """Add the entries of an exported FILE to yours; of two for the same calls the better known one stays."""
    from lagen.tune.store import StoreError, take

    try:
        _tell(*take(_folder(out), file.read_text(encoding="utf-8")))
    except (StoreError, UnicodeDecodeError) as error:
        raise click.ClickException(str(error)) from error


@tuned.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Into this folder instead of yours.")
def merge(folders: tuple[Path, ...], out: Path | None) -> None:
    """Add the entries of other FOLDERS to yours; of two for the same calls the better known one stays."""
    from lagen.tune.store import StoreError
    from lagen.tune.store import merge as merge_folders

    try:
        _tell(*merge_folders(_folder(out), folders))
    except StoreError as error:
        raise click.ClickException(str(error)) from error


def _tell(written: list[Path], passed: list[str]) -> None:
    for path in dict.fromkeys(written):
        click.echo(f"wrote {path}")
    for line in passed:
        click.echo(f"passed over: {line}", err=True)
