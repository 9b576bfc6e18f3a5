"""Launch the kernels: allocate, describe the bands, choose tiles. No arithmetic on the host, no synchronisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton import cdiv

from pi_attention.ops.triton.backward import band_backward_key_kernel, band_backward_query_kernel, row_terms_kernel
from pi_attention.ops.triton.forward import band_forward_kernel
from pi_attention.ops.triton.tuning import Tiles, choose_tiles
from pi_attention.pattern import PiPattern

LOG2E = 1.4426950408889634
INTERPRETED = triton.knobs.runtime.interpret


def _row_lags(pattern: PiPattern, skip: bool, head: int, length: int) -> tuple[int, int, int, int, int]:
    """Period, and the row lags [first, last) of the band and of its mirror image, of one head."""
    band = pattern.skip_band(head) if skip else pattern.local_band
    sides = [(side.first, side.last or 0) for side in pattern.signed_bands(band, length)]
    sides = [(0, 0)] * (2 - len(sides)) + sides
    return band.stride, *sides[1], *sides[0]


@lru_cache(maxsize=64)
def _band_table(pattern: PiPattern, length: int, device: torch.device) -> Tensor:
    rows = [_row_lags(pattern, True, head, length) for head in range(len(pattern.periods))]
    return torch.tensor(rows, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Launch:
    """One band of one call: what all of its kernels are given."""

    query: Tensor
    key: Tensor
    value: Tensor
    starts: Tensor | None
    pattern: PiPattern
    skip: bool
    scale: float

    @property
    def per_head(self) -> bool:
        return self.skip and len(set(self.pattern.periods)) > 1

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    @property
    def periods(self) -> tuple[int, ...]:
        return self.pattern.periods if self.skip else (1,)

    def tiles(self, kernel: str) -> Tiles:
        length = self.key.shape[2] if kernel == "backward key" else self.query.shape[2]
        return choose_tiles(
            kernel,
            self.skip,
            triton.next_power_of_2(self.query.shape[3]),
            cdiv(length, min(self.periods)),
            wide=self.query.dtype == torch.float32,
            interpreted=INTERPRETED,
        )

    def tensors(self) -> tuple[Any, ...]:
        """Q, K, V, Starts, Bands; what is not there is any pointer, and not read."""
        bands = self.query
        if self.per_head:
            bands = _band_table(self.pattern, self.key.shape[2], self.query.device)
        starts = self.query if self.starts is None else self.starts
        return self.query, self.key, self.value, starts, bands

    def strides(self) -> tuple[int, ...]:
        return self.query.stride() + self.key.stride() + self.value.stride()

    def lags(self) -> tuple[int, ...]:
        """period, first, last, mirror_first, mirror_last, sinks."""
        return *_row_lags(self.pattern, self.skip, 0, self.key.shape[2]), self.pattern.sinks

    def flags(self, tiles: Tiles) -> dict[str, Any]:
        dim = self.query.shape[3]
        exact = self.query.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        return {
            "GROUP": self.group,
            "D": dim,
            "BD": max(16, triton.next_power_of_2(dim)),
            "BM": tiles.queries,
            "BN": tiles.keys,
            "RING": self.pattern.ring,
            "SEGMENTS": self.starts is not None,
            "SINKS": self.skip and self.pattern.sinks > 0,
            "PER_HEAD": self.per_head,
            "MIRROR": not self.pattern.causal and self.skip,
            "PRECISION": "ieee" if exact else "tf32",
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }

    def query_tiles(self, rows: int) -> int:
        length = self.query.shape[2]
        return max(min(period, length) * cdiv(cdiv(length, period), rows) for period in self.periods)

    def key_tiles(self, rows: int) -> int:
        length = self.key.shape[2]
        return max(period * cdiv(cdiv(length, period), rows) for period in self.periods)


def launch_forward(
    launch: Launch, fuse: tuple[Tensor, Tensor] | None = None, gate: Tensor | None = None, mass: bool = False
) -> tuple[Tensor, Tensor]:
    """out [B, H, T, D] and log-sum-exp [B, H, T] of a band; with `fuse`, out is fused with that skip output and lse."""
    batch, heads, length, _ = launch.query.shape
    out = torch.empty_like(launch.query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=out.device)
    tiles = launch.tiles("forward")
    count = launch.query_tiles(tiles.queries)
    flags = launch.flags(tiles)
    skip_out, skip_lse = (out, lse) if fuse is None else fuse
    band_forward_kernel[(count * batch * heads,)](
        *launch.tensors(),
        lse if gate is None else gate,
        skip_out,
        skip_lse,
        out,
        lse,
        *launch.strides(),
        *((0, 0, 0) if gate is None else gate.stride()),
        count,
        heads,
        length,
        launch.key.shape[2],
        *launch.lags(),
        launch.scale * LOG2E,
        FUSE=fuse is not None,
        MASS=mass,
        GATED=gate is not None,
        **flags,
    )
    return out, lse


@dataclass(frozen=True)
class Saved:
    """What a forward pass leaves for the backward pass; of the skip band only when both were computed."""

    out: Tensor
    lse: Tensor
    skip_out: Tensor | None
    skip_lse: Tensor | None


def launch_row_terms(
    saved: Saved, grad_out: Tensor, grad_lse: Tensor, grad_skip_lse: Tensor, gate: Tensor | None, mass: bool
) -> tuple[Tensor, Tensor | None]:
    """Terms w, c of the one band, or of the local and the skip band, [2 or 4, B, H, T]; gradient of the gate logits."""
    batch, heads, length, dim = saved.out.shape
    both = saved.skip_out is not None
    terms = torch.empty(4 if both else 2, batch, heads, length, dtype=torch.float32, device=saved.out.device)
    grad_gate = torch.empty_like(saved.lse) if gate is not None else None
    rows, tile = batch * heads * length, 256 if INTERPRETED else 64
    row_terms_kernel[(cdiv(rows, tile),)](
        grad_out,
        saved.out,
        saved.skip_out if both else saved.out,
        saved.lse,
        saved.skip_lse if both else saved.lse,
        grad_lse.contiguous(),
        grad_skip_lse.contiguous() if both else saved.lse,
        saved.lse if gate is None else gate,
        terms,
        terms if grad_gate is None else grad_gate,
        *grad_out.stride(),
        *((0, 0, 0) if gate is None else gate.stride()),
        heads,
        length,
        rows,
        D=dim,
        BD=max(16, triton.next_power_of_2(dim)),
        BM=tile,
        BOTH=both,
        MASS=mass,
        GATED=gate is not None,
        num_warps=4,
    )
    return terms, grad_gate


def launch_backward_query(
    launch: Launch, grad_out: Tensor, lse: Tensor, terms: Tensor, grad_query: Tensor, add: bool
) -> None:
    """Write the gradient of the queries of one band, or add it to what is there."""
    batch, heads, length, _ = launch.query.shape
    tiles = launch.tiles("backward query")
    count = launch.query_tiles(tiles.queries)
    band_backward_query_kernel[(count * batch * heads,)](
        *launch.tensors(),
        grad_out,
        lse,
        terms[0],
        terms[1],
        grad_query,
        *launch.strides(),
        *grad_out.stride(),
        count,
        heads,
        length,
        launch.key.shape[2],
        *launch.lags(),
        launch.scale,
        launch.scale * LOG2E,
        ADD=add,
        **launch.flags(tiles),
    )


def launch_backward_key(
    launch: Launch, grad_out: Tensor, lse: Tensor, terms: Tensor, grads: tuple[Tensor, Tensor], add: bool
) -> None:
    """Write the gradients of the keys and values of one band, or add them to what is there."""
    batch, groups, key_length, _ = launch.key.shape
    tiles = launch.tiles("backward key")
    count = launch.key_tiles(tiles.keys)
    for first, members in _members(launch):
        band_backward_key_kernel[(count * batch * groups,)](
            *launch.tensors(),
            grad_out,
            lse,
            terms[0],
            terms[1],
            *grads,
            *launch.strides(),
            *grad_out.stride(),
            count,
            groups,
            launch.query.shape[2],
            key_length,
            *launch.lags(),
            launch.scale,
            launch.scale * LOG2E,
            first,
            members,
            ADD=add or first > 0,
            **launch.flags(tiles),
        )


def _members(launch: Launch) -> Iterator[tuple[int, int]]:
    """Heads of a group that one launch serves: all, or one after another where their periods differ."""
    if not launch.per_head:
        yield 0, launch.group
    else:
        for member in range(launch.group):
            yield member, 1
