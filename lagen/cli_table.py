"""Tables of the command line: as wide as a terminal, in full where the output is no terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def table(header: Sequence[str], rows: Iterable[Iterable[object]], title: str = "") -> None:
    """Prints a table on standard output; columns of numbers are flush right."""
    body = [list(map(str, row)) for row in rows]
    drawn = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(header):
        numeric = all(row[i].replace(".", "", 1).isdigit() for row in body)
        drawn.add_column(name, justify="right" if body and numeric else "left")
    for row in body:
        drawn.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = 240
    console.print(drawn)
