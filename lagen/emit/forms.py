"""Chooses between the forms of a scan: fused, segmented, split. The function is printed into generated files, and explain calls it."""

from __future__ import annotations


def segments(programs: int, chunks: int, processors: int, longest: int, chosen: int = 0) -> tuple[int, str]:
    """Chooses how many chunks a program runs through, and says why.

    ``programs`` are those of a fused scan (batch x heads x tiles), ``processors`` the device's, ``longest`` the chunks whose offsets
    fit 32 bits; ``chosen`` is what the tuner found, 0 where it did not.
    """
    if chunks <= 1:
        return 1, "fused: one chunk"
    if chosen:
        length = min(chosen, longest, chunks)
        return length, f"segments of {length} chunks were chosen"
    if 4 * programs >= 3 * processors and chunks <= longest:
        return chunks, f"fused: {programs} programs keep {processors} processors busy, the state never leaves registers"
    want = max(1, chunks * programs // (2 * processors))
    length = min(longest, 1 << (want.bit_length() - 1))
    if length >= chunks:
        return chunks, f"fused: {chunks} chunks are too few to cut"
    if length == 1:
        return 1, f"split: {programs} programs leave most of {processors} processors idle"
    return length, f"segmented: {programs} programs are too few for {processors} processors; segments of {length} chunks"
