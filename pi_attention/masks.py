"""Dense masks of a pattern, and the same pattern as a FlexAttention `mask_mod`. For reading, plotting and testing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pi_attention.pattern import PiPattern


def dense_masks(
    pattern: PiPattern,
    query_length: int,
    key_length: int,
    *,
    starts: Tensor | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Which keys each query sees: the local mask and the skip mask, bool, True where visible.

    Args:
        query_length: T, at most S; query i stands at position S − T + i.
        key_length: S.
        starts: [B, S] from `segment_starts`, or None for one segment.

    Returns:
        local [B or 1, 1, T, S] and skip [B or 1, periods, T, S], where periods is 1 or the number of query heads.
    """
    device = starts.device if starts is not None else device
    key = torch.arange(key_length, device=device)
    query = torch.arange(key_length - query_length, key_length, device=device)[:, None]
    together = torch.ones((), dtype=torch.bool, device=device)
    start: Tensor | int = 0
    if starts is not None:
        start = starts[:, None, key_length - query_length :, None]  # [B, 1, T, 1]
        together = (start == starts[:, None, None, :]) & (start >= 0)
    local = pattern.sees_local(query, key, length=key_length, start=start) & together
    skip = [
        pattern.sees_skip(query, key, head=head, length=key_length, start=start) & together
        for head in range(len(pattern.periods))
    ]
    shape = (query_length, key_length)
    local = local.reshape(-1, 1, *shape)
    return local, torch.stack([mask.reshape(-1, *shape) for mask in skip], dim=1)


def dense_mask(pattern: PiPattern, query_length: int, key_length: int, *, starts: Tensor | None = None) -> Tensor:
    """The union of both bands, [B or 1, 1 or H, T, S] bool: an `attn_mask` for scaled_dot_product_attention."""
    local, skip = dense_masks(pattern, query_length, key_length, starts=starts)
    return local | skip


MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def flex_mask_mod(
    pattern: PiPattern,
    query_length: int,
    key_length: int,
    *,
    band: str = "both",
    starts: Tensor | None = None,
) -> MaskMod:
    """The pattern as a `mask_mod(batch, head, query, key)` for `torch.nn.attention.flex_attention`.

    Args:
        band: "both", "local" or "skip": one softmax over the union, or one band alone.
        starts: [B, S] from `segment_starts`, or None for one segment.

    FlexAttention skips blocks of 128 × 128 without a visible pair; a period below 256 leaves it none to skip.
    """
    if band not in ("both", "local", "skip"):
        raise ValueError(f"band must be 'both', 'local' or 'skip', got {band!r}.")
    offset = key_length - query_length

    def skip_of_heads(head: Tensor, query: Tensor, key: Tensor, start: Tensor | int) -> Tensor:
        if len(pattern.periods) == 1:
            return pattern.sees_skip(query, key, length=key_length, start=start)
        seen = query < 0
        for h in range(len(pattern.periods)):
            seen = seen | ((head == h) & pattern.sees_skip(query, key, head=h, length=key_length, start=start))
        return seen

    def mask_mod(batch: Tensor, head: Tensor, query_index: Tensor, key: Tensor) -> Tensor:
        query = query_index + offset
        start = 0 if starts is None else starts[batch, query]
        seen = query < 0
        if band != "skip":
            seen = seen | pattern.sees_local(query, key, length=key_length, start=start)
        if band != "local":
            seen = seen | skip_of_heads(head, query, key, start)
        if starts is None:
            return seen
        return seen & (start == starts[batch, key]) & (start >= 0)

    heads = "-".join(f"{skip.stride}+{skip.phase}" if skip.phase else str(skip.stride) for skip in pattern.skip_bands())
    mask_mod.__name__ = f"pi_w{pattern.window}_p{heads}_m{pattern.skips}_{band}"
    return mask_mod
