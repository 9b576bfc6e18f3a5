"""Segment ids: one int32 tensor [B, S] that serves packed documents, left and right padding and ragged batches.

A segment is a contiguous run of equal ids; a query sees keys of its own segment only; negative ids are padding.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

MADE, ALWAYS = "_pi_segment_starts", "_pi_always_segment_starts"
"""Attributes of a tensor of segment starts: its version, which changes when somebody writes to it, and whose version it
is, which a copy's is not; and that whoever writes to it writes such starts again."""
TORN = (
    "attention_mask has padding between tokens of a row: those behind it do not see those before it, as if they were "
    "another document. Leave such tokens out and pad on one side, or pass a mask of ones where a padding token is text."
)
RUN, LONG = 256, 8192
"""A row of more than LONG tokens is scanned by runs of RUN."""


def have_values(x: Tensor) -> bool:
    """Whether a tensor's values can be looked at: not while a compiler traces, nor on the device "meta"."""
    return not (torch.compiler.is_compiling() or x.is_meta)


def segments_from_mask(attention_mask: Tensor) -> Tensor:
    """Segment ids of a padding mask: real tokens (non-zero) are one segment a row, padding is −1.

    Padding between tokens ends a segment.

    Args:
        attention_mask: [B, S] of 1 and 0, in any dtype; left, right or both sides padded.

    Raises:
        TypeError, ValueError: it is no such tensor; values are looked at where there are any.
    """
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a Tensor [B, S], got {type(attention_mask).__name__}.")
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be [B, S], got shape {tuple(attention_mask.shape)}: "
            "pass the two-dimensional padding mask of the tokenizer."
        )
    if have_values(attention_mask) and bool((attention_mask < 0).any()):
        raise ValueError(
            "attention_mask holds negative numbers, as a mask that is added to scores does: pass 1 for tokens and 0 "
            "for padding."
        )
    return (attention_mask != 0).to(torch.int32) - 1


def segments_from_cu_seqlens(cu_seqlens: Tensor, length: int) -> Tensor:
    """Segment ids [1, length] of packed documents, from the cumulative lengths that varlen kernels take.

    Args:
        cu_seqlens: [documents + 1] integers, from 0 upwards; tokens from cu_seqlens[-1] to `length` are padding.
        length: number of tokens of the packed row, S.

    Raises:
        TypeError, ValueError: they are no such lengths; values are looked at where there are any.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        raise TypeError("cu_seqlens must be an integer Tensor [documents + 1] of cumulative lengths, from 0 upwards.")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must be [documents + 1], got shape {tuple(cu_seqlens.shape)}.")
    if have_values(cu_seqlens):
        first, last, grows = cu_seqlens[0], cu_seqlens[-1], (cu_seqlens.diff() >= 0).all()
        if first or last > length or not grows:
            raise ValueError(
                f"cu_seqlens must go from 0 upwards to at most length={length}, got {cu_seqlens.tolist()[:8]} …: they "
                "are the sums of the documents' lengths."
            )
    position = torch.arange(length, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens.to(position.dtype), position, right=True) - 1
    return torch.where(document < cu_seqlens.numel() - 1, document, -1).to(torch.int32)[None]


def segment_starts(segment_ids: Tensor) -> Tensor:
    """For each token the position where its segment starts, −1 for padding: [B, S] int32, row by row in memory.

    Two tokens are in one segment exactly when their starts are equal and not negative; so this is the form that the
    implementations work on. The ids may have any strides, which kernels do not ask for. Outside of compiled code and
    inference mode, what this function returned comes back as it is, unless somebody wrote to it since.
    """
    if _are_starts(segment_ids):
        return segment_ids
    position = torch.arange(segment_ids.shape[1], dtype=torch.int32, device=segment_ids.device)
    changed = torch.ones_like(segment_ids, dtype=torch.bool)
    changed[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = _running_maximum(torch.where(changed, position, 0))
    starts = torch.where(segment_ids >= 0, starts, -1).to(torch.int32).contiguous()
    return starts if torch.compiler.is_compiling() else as_starts(starts)


def starts_of_last(segment_ids: Tensor) -> Tensor:
    """`segment_starts` for a query that is the last token: [B, S] int32, −1 for what is not of its segment.

    Args:
        segment_ids: [B, S] int32, another id for each segment of a row, as where its start is its id.
    """
    mine = (segment_ids == segment_ids[:, -1:]) & (segment_ids >= 0)
    first = segment_ids.shape[1] - mine.sum(dim=1, keepdim=True, dtype=torch.int32)
    return as_starts(torch.where(mine, first, -1))


def as_starts(starts: Tensor, *, always: bool = False) -> Tensor:
    """The same tensor, which `segment_starts` then returns as it is: a row-major int32 one of segment starts.

    Args:
        starts: to which nobody writes in compiled code, which cannot notice.
        always: whoever writes to it writes starts, anywhere.
    """
    if always or torch.compiler.is_compiling():
        setattr(starts, ALWAYS, True)
    elif not starts.is_inference():  # which does not count what is written to it
        setattr(starts, MADE, (starts._version, id(starts)))
    return starts


def _are_starts(segment_ids: Tensor) -> bool:
    if hasattr(segment_ids, ALWAYS):
        return True
    if torch.compiler.is_compiling() or not hasattr(segment_ids, MADE):
        return False
    return getattr(segment_ids, MADE) == (segment_ids._version, id(segment_ids))


def starts_of_batch(
    segment_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past: int,
    batch: int,
    tokens: int,
) -> Tensor | None:
    """Segment starts [B, past + T] for all layers of a model, which do not write to them.

    Of the segment ids, or where there are none, of what `segments_of_batch` takes; None when each row is one segment.
    """
    if segment_ids is None:
        segment_ids = segments_of_batch(attention_mask, position_ids, past, batch, tokens)
    return None if segment_ids is None else as_starts(segment_starts(segment_ids))


def _running_maximum(x: Tensor) -> Tensor:
    """cummax of [B, S] with values from 0 upwards."""
    return x.cummax(dim=1).values if torch.compiler.is_compiling() or x.device.type == "cpu" else cummax_in_runs(x)


def cummax_in_runs(x: Tensor) -> Tensor:
    """cummax of [B, S] with values from 0 upwards, a long row in runs: a GPU takes a row step by step.

    On an H200, PyTorch's cummax of one row of 32,768 takes 80 µs.
    """
    rows, length = x.shape
    if length <= LONG:
        return x.cummax(dim=1).values
    runs = F.pad(x, (0, -length % RUN)).view(rows, -1, RUN).cummax(dim=2).values
    before = cummax_in_runs(F.pad(runs[:, :-1, -1], (1, 0)))
    return torch.maximum(runs, before[:, :, None]).flatten(1)[:, :length]


def segments_of_batch(
    attention_mask: Tensor | None, position_ids: Tensor | None, past: int, batch: int, tokens: int
) -> Tensor | None:
    """Segment ids [B, past + T] from what Hugging Face callers pass; None when each row is one segment.

    A document starts where the position ids do not go on by one, so packed documents never see one another, with or
    without a mask and a cache; the first new token belongs to the document that started position_ids[:, 0] tokens ago.
    One starts behind padding, too, which is warned of where the positions do not say so.

    Raises:
        ValueError: the mask is not of all tokens.
    """
    if attention_mask is None and position_ids is None:
        return None
    length = past + tokens
    if attention_mask is not None and (
        attention_mask.dim() != 2 or attention_mask.shape[0] not in (1, batch) or attention_mask.shape[1] != length
    ):
        raise ValueError(
            f"attention_mask must be [{batch}, {length}] for {past} cached and {tokens} new tokens, got "
            f"{tuple(attention_mask.shape)}: pass the padding mask of all tokens; the pattern makes the rest."
        )
    like = attention_mask if attention_mask is not None else position_ids
    assert like is not None
    ids = torch.zeros(batch, length, dtype=torch.int32, device=like.device)
    if position_ids is not None:
        first = (past - position_ids[:, :1]).clamp(min=0)
        starts_here = torch.arange(length, device=like.device) == first
        jumps = position_ids[:, 1:] != position_ids[:, :-1] + 1
        starts_here = starts_here.expand(position_ids.shape[0], -1).clone()
        starts_here[:, past + 1 :] |= jumps
        ids = ids + starts_here.cumsum(dim=1, dtype=torch.int32)
    real = None if attention_mask is None else attention_mask != 0
    if real is not None:
        ids = torch.where(real, ids, -1)
    if have_values(ids):  # a GPU is waited for
        if bool(((ids == ids[:, :1]) & (ids >= 0)).all()):
            return None
        if real is not None and _goes_on_behind_padding(real, position_ids, past):
            warnings.warn(TORN, stacklevel=2)
    return ids


def _goes_on_behind_padding(real: Tensor, position_ids: Tensor | None, past: int) -> bool:
    """Whether some row [B, past + T] has a new token behind padding that no position 0 calls a document's first."""
    before = F.pad(real, (1, 0))[:, past:-1]  # of each new token
    begun = F.pad(real.cumsum(dim=1), (1, 0))[:, past:-1] > 0
    torn = real[:, past:] & ~before & begun
    return bool((torn if position_ids is None else torn & (position_ids != 0)).any())
