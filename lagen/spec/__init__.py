"""The spec language: reading a YAML file into an ir.variant.Variant, with every mistake at its place."""

from lagen.spec.mistakes import Mistake, SpecErrors
from lagen.spec.read import read, read_text

__all__ = ["Mistake", "SpecErrors", "read", "read_text"]
