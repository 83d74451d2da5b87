"""Makes source text from the compiler's values; the only place that does."""
