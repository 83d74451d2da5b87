"""Proof: the float64 oracle, random cases, error measures and the laws that every operator must keep."""
