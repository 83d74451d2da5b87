"""lagen: a compiler for linear attention."""
