"""Guard against steps that would spoil a run: detected and undone on the device, on all ranks.

A step is kept if loss and gradient norm are finite on every rank and, where configured, its loss is
no spike. Otherwise weights, moments, averages and the buffers that the forward pass wrote keep
their earlier bits, while schedules and data go on. The host learns of a skipped step where metrics
are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from m3i_fast.config.guard import GuardConfig
from m3i_fast.engine.optim.skippable_step import restore_where
from m3i_fast.engine.parallel.local_shards import GradientNorm, local
from m3i_fast.engine.parallel.ranks import World

Record = dict[str, Any]
"""A rank's record of a skipped step; JSON-able."""


class Guard:
    """Decides of each step whether it is kept or skipped, on all ranks alike.

    The order in a step is `save_buffers`, forward and backward, `judge`, the optimiser,
    `restore_buffers`, and `record` on the host. All but the last can be captured in a graph.
    """

    skip: Tensor
    """Flag [] fp32 of the last judged step: 1 if it is skipped."""

    def __init__(self, cfg: GuardConfig, model: nn.Module, world: World) -> None:
        self._cfg, self._world = cfg, world
        self._live = written_buffers(model)
        self._saved = [torch.empty_like(buffer) for buffer in self._live]
        self.skip = torch.zeros((), device=world.device)
        self._spikes = SpikeDetector(cfg, world.device)
        self._judged: list[JudgedStep] = []
        self._records: list[Record] = []
        self._steps: list[tuple[int, bool]] = []

    @torch.no_grad()
    def save_buffers(self) -> None:
        """Copy the buffers that the forward pass may write; call it before the forward pass."""
        if self._live:
            torch._foreach_copy_(self._saved, self._live)

    @torch.no_grad()
    def judge(
        self,
        metrics: Mapping[str, Tensor],  # [] each
        norm: GradientNorm,
    ) -> Judgement:
        """Decide whether the step is skipped, on all ranks alike, and set `skip`."""
        loss = metrics["loss/total"].detach()
        wrong = ~(loss.isfinite() & norm.total.isfinite())
        count, mean_loss = self._world.sum(
            torch.stack([wrong.to(loss.dtype), loss / self._world.size])
        ).unbind()
        spoilt = count > 0
        spike = torch.zeros_like(spoilt)
        if self._cfg.spikes != "off":
            spike = self._spikes.update(mean_loss, spoilt)
        flags = torch.stack([spoilt, spike]).float()
        self.skip = flags.amax()
        losses = {name: value for name, value in metrics.items() if name.startswith("loss/")}
        values = torch.stack([v.detach().float() for v in losses.values()])
        return Judgement(flags, tuple(losses), values, norm)

    def record(
        self,
        step: int,
        judgement: Judgement,
        *,
        names: Sequence[str],
        sample_ids: Tensor,  # [B] int64
    ) -> None:
        """Keep what was judged of a step until it is drained.

        names: of the gradients, in the order of `norm.each`.
        """
        self._judged.append(JudgedStep(step, judgement, tuple(names), sample_ids))

    def restore_buffers(self) -> None:
        """Restore the buffers of a skipped step; call it after the optimiser."""
        restore_where(self.skip > 0, self._live, self._saved)

    def drain(self) -> tuple[list[tuple[int, bool]], list[Record]]:
        """Return (step, skipped) of the steps since the last call, and this rank's skip records."""
        self._bring_to_host()
        steps, records = self._steps, self._records
        self._steps, self._records = [], []
        return steps, records

    def _bring_to_host(self) -> None:
        if not self._judged:
            return
        flags = torch.stack([judged.judgement.flags for judged in self._judged]).tolist()
        for judged, (spoilt, spike) in zip(self._judged, flags, strict=True):
            self._steps.append((judged.step, bool(spoilt or spike)))
            if spoilt or spike:
                self._records.append(judged.record("spike" if spike else "not finite"))
        self._judged.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-able values. This is a host synchronisation."""
        self._bring_to_host()
        return {
            "steps": [list(pair) for pair in self._steps],
            "records": list(self._records),
            "spikes": self._spikes.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._judged.clear()
        self._steps = [(step, skipped) for step, skipped in state["steps"]]
        self._records = list(state["records"])
        self._spikes.load_state_dict(state["spikes"])

    def first_unreported(self, step: int) -> int:
        """Return the first step that has not been drained, of those up to `step`."""
        return self._steps[0][0] if self._steps else step

    def rewind(self, state: Mapping[str, Any]) -> None:
        """Restore a checkpoint's statistics; its pending records were reported already."""
        self.load_state_dict({**state, "steps": [], "records": []})


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the device knows of a step's loss and gradients."""

    flags: Tensor  # [2] fp32, 1 or 0: not finite, spike
    names: tuple[str, ...]
    losses: Tensor  # [L] fp32
    norm: GradientNorm


@dataclass(frozen=True, slots=True)
class JudgedStep:
    """The values of one step, kept on the device until they are read."""

    step: int
    judgement: Judgement
    gradients: tuple[str, ...]
    sample_ids: Tensor  # [B] int64

    def record(self, reason: str) -> Record:
        """Return the record of this step as a skipped one. This is a host synchronisation."""
        judgement = self.judgement
        each = judgement.norm.each.float().tolist()
        return {
            "step": self.step,
            "reason": reason,
            "losses": dict(zip(judgement.names, judgement.losses.tolist(), strict=True)),
            "grad_norm": float(judgement.norm.total),
            "gradients": dict(zip(self.gradients, each, strict=True)),
            "sample_ids": self.sample_ids.tolist(),
        }


class SpikeDetector:
    """Running mean and variance, on the device, of the loss of the steps that are kept.

    With rate r = max(1 / (n + 1), 1 / window) after n losses, and d = loss - mean:
    mean += r d;  variance = (1 - r) (variance + r d^2).
    """

    def __init__(self, cfg: GuardConfig, device: torch.device) -> None:
        self._deviations, self._window = cfg.spike_deviations, cfg.spike_window
        self._state = torch.zeros(3, dtype=torch.float64, device=device)  # n, mean, variance

    def update(self, loss: Tensor, spoilt: Tensor) -> Tensor:  # [], [] bool -> [] bool
        """Return whether the loss [] is a spike, which then does not enter mean and variance."""
        count, mean, variance = self._state.unbind()
        off = loss.double() - mean
        spike = (count >= self._window) & (off > self._deviations * variance.sqrt()) & ~spoilt
        rate = (1 / (count + 1)).clamp(min=1 / self._window)
        moved = [count + 1, mean + rate * off, (1 - rate) * (variance + rate * off.square())]
        # In place: a graph reads and writes the memory that it was captured with.
        self._state.copy_(torch.where(spike | spoilt, self._state, torch.stack(moved)))
        return spike

    def state_dict(self) -> list[float]:
        """Return number, mean and variance. This is a host synchronisation."""
        return self._state.tolist()

    def load_state_dict(self, state: list[float]) -> None:
        """Restore number, mean and variance."""
        self._state.copy_(self._state.new_tensor(state))


def written_buffers(model: nn.Module) -> list[Tensor]:
    """Return the buffers that a forward pass may write and a checkpoint saves.

    These are statistics, centres and queues.
    """
    return [
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]


def not_finite(tensors: Mapping[str, Tensor], world: World) -> list[str]:
    """Return the names of at most three tensors that are not finite on some rank.

    Those of the world's device are looked at: what an optimiser has on the host beside them is a
    count of steps. It is one host synchronisation. Names are gathered only where the device has
    counted a tensor that is not finite, since a collective of Python objects occupies the host.
    """
    shards = {
        name: shard.detach()
        for name, shard in zip(tensors, local(tensors.values()), strict=True)
        if shard.is_floating_point() and shard.numel() and shard.device.type == world.device.type
    }
    largest = [norm.float() for norm in torch._foreach_norm(list(shards.values()), math.inf)]
    wrong_P = ~torch.stack(largest).isfinite()
    *flags, count = torch.cat([wrong_P, world.sum(wrong_P.sum(0, keepdim=True))]).tolist()
    if not count:
        return []
    wrong = [name for name, flag in zip(shards, flags, strict=True) if flag]
    return sorted({name for names in world.gather(wrong[:3]) for name in names})[:3]
