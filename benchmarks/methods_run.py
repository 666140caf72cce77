"""One run of the methods' benchmark, in a process of its own: calibrate, train, evaluate."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from m3i_fast.config import TrainConfig
from m3i_fast.engine import checkpoint
from m3i_fast.engine.calibration import calibrate
from m3i_fast.engine.evaluator import evaluate, evaluate_untrained
from m3i_fast.engine.trainer import Trainer
from m3i_fast.evaluation.protocol import Measured
from m3i_fast.observe.collapse import CollapseWatch
from m3i_fast.observe.metrics import read_jsonl

Packed = str | list[float]
LEFT_OUT = ("caption_to_image_recall_at_1", "few_label_knn_top1")  # in the figures alone


def train_and_measure(
    cfg: TrainConfig, out: Path, seconds: float | None, data: Path
) -> dict[str, Any]:
    """Train `cfg` in `out`, or go on with the run that is there, and return a row's figures.

    seconds: training time that a calibration turns into steps; None takes cfg.num_steps. A run that
    goes on keeps all of its config. data: as of `evaluate`. Raises InterruptedError after a
    checkpoint at SIGINT or SIGTERM, and what Trainer and evaluate raise.
    """
    resume = bool(checkpoint.checkpoints(out / "checkpoints"))
    if resume:
        cfg = TrainConfig.load(out / "config.json")
    else:
        if out.exists():  # stopped before its first checkpoint
            shutil.rmtree(out)
        if seconds is not None:
            cfg = replace(cfg, num_steps=calibrate(cfg, seconds))
    outcome = Trainer(cfg, out, resume=resume).train()
    if outcome.signal is not None:
        raise InterruptedError(
            f"signal {outcome.signal} at step {outcome.step} of {cfg.num_steps}; the same command "
            "goes on from there"
        )
    figures, measured = evaluate(out, baselines=False, data=data)
    del figures["trained_minus"]  # follows from the hits
    return {
        **training_figures(cfg, read_jsonl(out / "metrics.jsonl")),
        "resumed": resume,
        **figures,
        "hits": _packed(measured),
    }


def measure_untrained(cfg: TrainConfig) -> dict[str, Any]:
    """A row's figures of what a run of `cfg` starts from, and of raw pixels."""
    torch.set_num_threads(cfg.num_threads)
    figures, measured = evaluate_untrained(cfg)
    return {"num_steps": 0, **figures, "hits": _packed(measured)}


def _packed(measured: Mapping[str, Measured]) -> dict[str, dict[str, Packed]]:
    return {
        who: {
            name: pack(values.tolist())
            for name, values in (result.hits | result.nats).items()
            if name not in LEFT_OUT
        }
        for who, result in measured.items()
        if who not in ("chance", "ema")  # figures say enough of the EMA encoder: rows stay short
    }


def is_trained(out: Path) -> bool:
    """Whether `out` holds the last checkpoint of a run."""
    steps = [found.step for found in checkpoint.checkpoints(out / "checkpoints")]
    return bool(steps) and steps[-1] == TrainConfig.load(out / "config.json").num_steps


def training_figures(cfg: TrainConfig, rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Seconds, loss and collapses of a run, from its logged steps: all of them, resumed or not."""
    seconds, before = 0.0, 0.0
    watch = CollapseWatch(first_step=cfg.optim.warmup_steps(cfg.num_steps))
    collapsed = []
    for row in rows:
        num_images = (row["step"] - before) * cfg.data.batch_size
        seconds, before = seconds + num_images / row["throughput/img_s"], row["step"]
        collapsed += [found.name for found in watch.see(int(row["step"]), row)]
    return {
        "num_steps": cfg.num_steps,
        "batch_size": cfg.data.batch_size,
        "num_threads": cfg.num_threads,
        "train_seconds": seconds,
        "final_loss": rows[-1]["loss/total"],
        "collapsed": collapsed,
    }


def pack(hits: Sequence[float]) -> Packed:
    """One character an item where hits are of a few tries, which keeps a row short; else numbers.

    0 or 1 as "0110"; of three tries the number that hit, as "3:0312".
    """
    for tries in range(1, 10):
        counts = [round(hit * tries) for hit in hits]
        if all(
            0 <= n <= tries and abs(hit * tries - n) < 1e-6
            for hit, n in zip(hits, counts, strict=True)
        ):
            return f"{tries}:" * (tries > 1) + "".join(map(str, counts))
    return [round(hit, 4) for hit in hits]


def unpack(hits: Packed) -> list[float]:
    """The items' hits again."""
    if isinstance(hits, str):
        tries, of_several, counts = hits.rpartition(":")
        return [int(n) / (int(tries) if of_several else 1) for n in counts]
    return [float(hit) for hit in hits]
