"""The spec language: reading a YAML file into an ir.variant.Variant, with every mistake at its place."""

from lagen.spec.mistakes import Mistake, SpecErrors
from lagen.spec.read import place_of, read, read_text
from lagen.spec.read import warnings_of as lint
from lagen.spec.schema import schema

__all__ = ["Mistake", "SpecErrors", "lint", "place_of", "read", "read_text", "schema"]
