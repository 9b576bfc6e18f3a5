"""Means with 95 % intervals by Student's t."""

from __future__ import annotations

import math
import statistics

T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles for 1, 2, … degrees of freedom; 2.0 beyond, which is larger by at most 2 %."""


def interval(values: list[float]) -> tuple[float, float]:
    """Mean of independent values and half-width of its 95 % interval (nan for a single value)."""
    mean, freedom = statistics.fmean(values), len(values) - 1
    if freedom == 0:
        return mean, math.nan
    quantile = T_975[freedom - 1] if freedom <= len(T_975) else 2.0
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))
