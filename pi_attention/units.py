"""Figures in words: with their noun, or with the unit that suits their size."""

from __future__ import annotations

PREFIXES = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}


def counted(number: int, noun: str) -> str:
    """1 as "1 layer", 2000 as "2,000 layers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def in_flops(operations: float) -> str:
    """12_300_000 as "12.30 MFLOP"."""
    for prefix, size in PREFIXES.items():
        if operations >= size:
            return f"{operations / size:,.2f} {prefix}FLOP"
    return f"{operations:,.0f} FLOP"
