"""The host's answer to skipped steps: a row each, learning-rate back-off, rollback, abort."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from m3i_fast.config import TrainConfig
from m3i_fast.durable_files import write_atomically
from m3i_fast.engine.guard.guard import Record
from m3i_fast.engine.optim.optimizers import Optimizers
from m3i_fast.engine.parallel.local_shards import local
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.observe.metrics import read_jsonl

logger = logging.getLogger(__name__)

SKIPPED_ROW = {"step": int, "reason": str, "losses": [dict], "sample_ids": [list]}
SPAN = 1000  # number of last steps that guard.max_share is a share of
_REMEDY = "A lower optim.lr or a longer optim.warmup_fraction usually helps"


class SkippedSteps:
    """Counts of a run's skipped steps, equal on every rank, so that all ranks decide alike."""

    def __init__(self, cfg: TrainConfig, run_dir: Path, world: World) -> None:
        self._all, self._cfg, self._run_dir, self._world = cfg, cfg.guard, run_dir, world
        self._recent: list[int] = []  # skipped ones of the last SPAN steps
        self._last: Record | None = None
        self.in_a_row = self.total = self.rollbacks = 0
        self._scale, self._scaled_until = 1.0, 0

    @property
    def _path(self) -> Path:
        return self._run_dir / "skipped.jsonl"

    def lr_scale(self, step: int) -> float:
        """Return the factor of the learning rate at a step, below 1 during a back-off."""
        return self._scale if step < self._scaled_until else 1.0

    def record(self, steps: Sequence[tuple[int, bool]], records: list[Record]) -> list[Record]:
        """Count the steps since the last call; write and return a row for each skipped one.

        steps: (step, whether it was skipped). records: this rank's record of each skipped step; the
        records of all ranks are gathered.
        """
        longest = self.in_a_row
        for step, skipped in steps:
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            longest = max(longest, self.in_a_row)
            self._recent = [s for s in self._recent if s > step - SPAN] + [step] * skipped
        self.total += len(records)
        if not records:
            return []
        self._last = records[-1]
        rows = [_row(of_ranks) for of_ranks in zip(*self._world.gather(records), strict=True)]
        if self._world.is_main:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            with self._path.open("a") as file:
                file.write(text)
            logger.warning(
                "skipped %d of the last %d steps, the last one %d (%s): %s",
                len(rows),
                len(steps),
                rows[-1]["step"],
                rows[-1]["reason"],
                self._path,
            )
        self._back_off(steps[-1][0] + 1, longest)
        return rows

    def forget_after(self, step: int) -> None:
        """Drop the rows of `step` and later ones, which a resumed run takes or reports again."""
        if self._world.is_main and self._path.exists():
            kept = [row for row in read_jsonl(self._path, SKIPPED_ROW) if row["step"] < step]
            write_atomically(self._path, "".join(json.dumps(r) + "\n" for r in kept).encode())

    def excess(self) -> str | None:
        """Return which limit is exceeded, with its flag; None where none is."""
        cfg = self._cfg
        if self.in_a_row >= cfg.max_in_a_row:
            return (
                f"{self.in_a_row} steps in a row skipped, --guard.max-in-a-row {cfg.max_in_a_row}"
            )
        if len(self._recent) > cfg.max_share * SPAN:
            return (
                f"{len(self._recent)} of the last {SPAN} steps skipped, --guard.max-share "
                f"{cfg.max_share:g}"
            )
        return None

    def rolled_back(self) -> None:
        """Count a rollback; the run is before its last skipped steps again."""
        self.rollbacks += 1
        self.in_a_row = 0

    def abort(
        self, step: int, reason: str, model: nn.Module, optimizer: Optimizers
    ) -> FloatingPointError:
        """Write a dump of the state of every rank and return the error to raise."""
        dump = self._run_dir / f"dump_step_{step:08d}"
        dump.mkdir(exist_ok=True)
        record = {
            "step": step,
            "rank": self._world.rank,
            "reason": reason,
            "skipped": self.state_dict(),
            "last_skipped": self._last,
            "groups": _groups(model, optimizer, self._last),
        }
        text = json.dumps(_plain(record), indent=2) + "\n"
        write_atomically(dump / f"rank_{self._world.rank}.json", text.encode())
        if self._world.is_main:
            self._all.save(dump / "config.json")
        wrong = self._world.gather(_not_finite(self._last))
        listed = "; ".join(
            f"rank {r}: {', '.join(names)}" for r, names in enumerate(wrong) if names
        )
        return FloatingPointError(
            f"step {step}: {reason}. Not finite in the last skipped step: {listed or 'nothing'}. "
            f"{dump} has batches, norms and config; the last checkpoint is good. {_REMEDY}"
        )

    def _back_off(self, step: int, longest: int) -> None:
        after = self._cfg.backoff_after
        if not after or longest < after:
            return
        before = self.lr_scale(step)
        self._scale = before * self._cfg.backoff_scale
        self._scaled_until = step + self._cfg.backoff_steps
        logger.warning(
            "%d steps in a row skipped: learning rate times %g up to step %d "
            "(--guard.backoff-scale, --guard.backoff-steps)",
            longest,
            self._scale,
            self._scaled_until,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts as JSON-able values."""
        return {
            "recent": self._recent,
            "in_a_row": self.in_a_row,
            "total": self.total,
            "rollbacks": self.rollbacks,
            "scale": self._scale,
            "scaled_until": self._scaled_until,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts that `state_dict` returned."""
        self._recent = list(state["recent"])
        self.in_a_row, self.total = state["in_a_row"], state["total"]
        self.rollbacks = state["rollbacks"]
        self._scale, self._scaled_until = state["scale"], state["scaled_until"]


def _row(of_ranks: Sequence[Record]) -> dict[str, Any]:
    """Return a line of skipped.jsonl, where losses and sample ids are lists over the ranks."""
    first = of_ranks[0]
    return _plain(
        {
            "step": first["step"],
            "reason": first["reason"],
            "grad_norm": first["grad_norm"],
            "losses": [record["losses"] for record in of_ranks],
            "sample_ids": [record["sample_ids"] for record in of_ranks],
        }
    )


def _not_finite(record: Record | None) -> list[str]:
    """Return the names of this rank's losses and gradients that are not finite."""
    if record is None:
        return []
    losses = [name for name, value in record["losses"].items() if not math.isfinite(value)]
    wrong = [name for name, value in record["gradients"].items() if not math.isfinite(value)]
    if len(wrong) > 3:
        wrong[3:] = [f"{len(wrong) - 3} more"]
    return losses + [f"gradient of {name}" for name in wrong[:3]] + wrong[3:]


def _groups(model: nn.Module, optimizer: Optimizers, record: Record | None) -> list[dict[str, Any]]:
    """Return rates and norms of each parameter group; norms are of this rank's local shards."""
    names = {id(p): name for name, p in model.named_parameters()}
    gradients = record["gradients"] if record else {}
    groups = []
    for group in optimizer.param_groups:
        weights = {
            names[id(p)]: float(shard.detach().norm())
            for p, shard in zip(group["params"], local(group["params"]), strict=True)
        }
        groups.append(
            {
                "lr": float(group["lr"]),
                "weight_decay": group["weight_decay"],
                "weight_norm": math.hypot(*weights.values()),
                "gradient_norm": math.hypot(*(gradients.get(name, 0.0) for name in weights)),
                "weight_norms": weights,
                "gradient_norms": {n: gradients[n] for n in weights if n in gradients},
            }
        )
    return groups


def _plain(value: Any) -> Any:
    """Return strict JSON values: floats that are not finite become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
