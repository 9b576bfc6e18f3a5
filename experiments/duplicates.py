"""Texts that stood before, in whole or in part: by their runs of five lines."""

from __future__ import annotations

from zlib import crc32

import numpy as np

RUN = 5
"""Lines of a run."""
KEPT = 4
"""Every n-th run is looked at, by its hash, so that the same runs are in every text."""


def runs(text: str) -> np.ndarray:
    """Hashes uint64 of the runs of lines that are not blank; of a shorter text, one of the whole."""
    lines = np.array([crc32(line.strip().encode()) for line in text.splitlines() if line.strip()], np.uint64)
    hashed = np.zeros(max(1, len(lines) - RUN + 1), np.uint64)
    for place in range(min(RUN, len(lines))):
        hashed = hashed * np.uint64(0x9E3779B97F4A7C15) + lines[place : place + len(hashed)]
        hashed ^= hashed >> np.uint64(29)
    chosen = hashed[hashed % KEPT == 0]
    return np.unique(chosen if len(chosen) else hashed)


class Seen:
    """The runs of all texts so far."""

    def __init__(self) -> None:
        self.hashes: set[int] = set()

    def knows(self, text: str, share: float) -> bool:
        """Whether more than this share of a text's runs stood in earlier texts; if not, it becomes one of them."""
        found = runs(text).tolist()
        known = sum(run in self.hashes for run in found) > share * len(found)
        if not known:
            self.hashes.update(found)
        return known
