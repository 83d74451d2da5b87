"""Finds and fills the templates of templates/: undefined names are errors, and the same values give the same bytes."""

from __future__ import annotations

from functools import cache

import jinja2

from lagen import data


@cache
def environment() -> jinja2.Environment:
    """Returns the one environment that all templates are filled in."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(data.templates()), undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
