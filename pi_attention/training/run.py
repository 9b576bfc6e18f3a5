"""The steps of a run: one loop, for one process and for each rank of any layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from torch import Tensor

from pi_attention.data.packing import PackedBlocks
from pi_attention.training.config import TrainConfig, to_plain
from pi_attention.training.interrupts import Interrupts
from pi_attention.training.metrics import drop_metrics_after
from pi_attention.training.optimizer import adamw, clip_gradients, schedule_from
from pi_attention.training.progress import ProgressBar, Reports
from pi_attention.training.resume import blocks_a_step
from pi_attention.training.state import load, save
from pi_attention.training.step import Parallel
from pi_attention.training.trackers import Trackers


@lru_cache(maxsize=2)
def _order(blocks: int, seed: int) -> list[int]:
    return torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).tolist()


def blocks_of_step(step: int, count: int, blocks: int, seed: int) -> list[int]:
    """The blocks of an optimizer step: each epoch is a new permutation, the same for every layout."""
    numbers = range(step * count, (step + 1) * count)
    return [_order(blocks, seed + number // blocks)[number % blocks] for number in numbers]


class Run:
    """A model, its data and its optimizer, and the steps that are left.

    Nothing of a step is drawn at random but the order of the blocks, and that is a function of the step: so weights
    and moments are all that a checkpoint needs.

    Args:
        config: of the run.
        parallel: the model on this rank.
        training, validation: blocks, the same on every rank.
        console: quiet on all ranks but the first.
    """

    def __init__(
        self,
        config: TrainConfig,
        parallel: Parallel,
        training: PackedBlocks,
        validation: PackedBlocks,
        console: Console,
    ) -> None:
        self.config, self.parallel, self.console = config, parallel, console
        self.training, self.validation = training, validation
        self.device = next(parallel.model.parameters()).device
        self.blocks = blocks_a_step(config)
        self.optimizer = adamw(parallel.model, config.optimizer)

    def go(self, checkpoint: Path | None) -> int:
        """All steps from a checkpoint on; the step after which the run ended, by itself or by Ctrl-C, saved."""
        o, run, first = self.config.optimizer, self.config.run, self.parallel.is_first
        begin = 0 if checkpoint is None else load(checkpoint, self.parallel.model, self.optimizer)
        schedule = schedule_from(self.optimizer, o, begin)
        if first:
            drop_metrics_after(run.out, begin)
        bar = ProgressBar(o.steps, begin, self.blocks * self.config.data.context, self.console)
        losses: list[float] = []  # since the last report
        trackers = Trackers(run.report_to, run.out, to_plain(self.config)) if first else None
        with Reports(run.out if first else None, bar, trackers) as reports, self._interrupts() as interrupts:
            for step in range(begin + 1, o.steps + 1):
                bar.step_begins()
                rate = float(schedule.get_last_lr()[0])
                loss, norm, stop = self._step(step, interrupts)
                schedule.step()
                losses.append(loss)
                bar.step_ends()
                last = step == o.steps
                figures: dict[str, float] = {}
                if step == 1 or last or step % run.log_every == 0:
                    epoch = step * self.blocks / len(self.training)
                    figures = {"loss": fmean(losses), "grad_norm": norm, "learning_rate": rate, "epoch": epoch}
                    losses.clear()
                if last or step % run.eval_every == 0:
                    figures["eval_loss"] = self._validate()
                if figures:
                    reports.add(step, **figures)
                if last or stop or step % run.save_every == 0:
                    save(run.out, step, self.parallel.model, self.optimizer, run.keep_checkpoints)
                if stop:
                    return step
        return max(begin, o.steps)

    def _interrupts(self) -> Interrupts:
        return Interrupts(second_stops=self.parallel.mesh is None)

    def _step(self, step: int, interrupts: Interrupts) -> tuple[float, float, bool]:
        """One optimizer step, counted from 1: loss and norm of the gradient, and whether any rank was interrupted."""
        chosen = blocks_of_step(step - 1, self.blocks, len(self.training), self.config.run.seed)
        tokens = sum(self.training.predicted(index) for index in chosen)
        rank, ranks = self.parallel.place("dp")
        each = self.blocks // ranks
        batches = list(self._batches(self.training, chosen[rank * each : (rank + 1) * each]))
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, 1):
            loss = self.parallel.loss(batch, tokens)
            self.parallel.backward(loss, last=number == len(batches))
            total += loss.detach()
        norm = clip_gradients(self.parallel.model.parameters(), self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        noted = torch.full_like(total, float(interrupts.noted))
        loss_of_all, any_noted = self.parallel.mean(torch.stack([total, noted])).tolist()  # all stop at one step
        return loss_of_all, float(norm), any_noted > 0

    @torch.no_grad()
    def _validate(self) -> float:
        held_out = range(min(self.config.run.eval_blocks, len(self.validation)))
        tokens = sum(self.validation.predicted(index) for index in held_out)
        self.parallel.model.eval()
        batches = self._batches(self.validation, held_out)
        total = torch.stack([self.parallel.loss(batch, tokens) for batch in batches]).sum()
        self.parallel.model.train()
        return float(self.parallel.mean(total)) / self.parallel.place("dp")[1]  # every group computes all blocks

    def _batches(self, blocks: PackedBlocks, chosen: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        size = 1 if self.parallel.one_row else self.config.optimizer.batch_size
        for start in range(0, len(chosen), size):
            rows = [blocks[index] for index in chosen[start : start + size]]
            yield {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]}
