"""One run of the methods' benchmark, in a process of its own: calibrate, train, evaluate."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from m3i_fast.config import TrainConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.evaluator import Evaluation, evaluate, evaluate_untrained
from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe.collapse import CollapseWatch
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.planning.step_budget import calibrate

Packed = str | list[float | None]
LEFT_OUT = ("caption_to_image_recall_at_1", "few_label_knn_top1")  # in the figures alone


def train_and_measure(
    cfg: TrainConfig, out: Path, seconds: float | None, data: Path, split: str
) -> dict[str, Any]:
    """Train `cfg` in `out`, or go on with the run that is there, and return a row's figures.

    seconds: training time that a calibration turns into steps; None takes cfg.num_steps. A run that
    goes on keeps all of its config. data, split: as of `evaluate`. Raises InterruptedError after a
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
    evaluation = evaluate(out, split=split, baselines=False, data=data)
    del evaluation.figures["trained_minus"]  # follows from the hits
    return {
        **training_figures(cfg, read_jsonl(out / "metrics.jsonl")),
        "resumed": resume,
        **evaluation.figures,
        **_by_item(evaluation),
    }


def measure_untrained(cfg: TrainConfig, split: str) -> dict[str, Any]:
    """Return a row's figures of the weights that a run of `cfg` starts from, and of raw pixels."""
    torch.set_num_threads(cfg.num_threads)
    evaluation = evaluate_untrained(cfg, split=split)
    return {"num_steps": 0, **evaluation.figures, **_by_item(evaluation)}


def _by_item(evaluation: Evaluation) -> dict[str, Any]:
    """Return the hits of every source, and once for all of them what the items are."""
    hits = {
        who: {
            name: pack(values.tolist())
            for name, values in (result.hits | result.nats).items()
            if name not in LEFT_OUT
        }
        for who, result in evaluation.measured.items()
        if who not in ("chance", "ema")  # figures say enough of the EMA encoder: rows stay short
    }
    items = {
        "hard": pack(evaluation.held_out.hard.double().tolist()),
        "cluster": evaluation.held_out.cluster.tolist(),
    }
    return {"hits": hits, "items": items}


def is_trained(out: Path) -> bool:
    """Return whether `out` holds the last checkpoint of a run."""
    steps = [each.step for each in checkpoint.checkpoints(out / "checkpoints")]
    return bool(steps) and steps[-1] == TrainConfig.load(out / "config.json").num_steps


def training_figures(cfg: TrainConfig, rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return seconds, loss and collapses of a run, from all of its logged steps."""
    seconds, before = 0.0, 0.0
    watch = CollapseWatch(first_step=cfg.optim.warmup_steps(cfg.num_steps))
    collapsed = []
    for row in rows:
        num_images = (row["step"] - before) * cfg.data.batch_size
        seconds, before = seconds + num_images / row["throughput/img_s"], row["step"]
        collapsed += [collapse.name for collapse in watch.new_collapses(int(row["step"]), row)]
    return {
        "num_steps": cfg.num_steps,
        "batch_size": cfg.data.batch_size,
        "num_threads": cfg.num_threads,
        "train_seconds": seconds,
        "final_loss": rows[-1]["loss/total"],
        "collapsed": collapsed,
    }


def pack(hits: Sequence[float]) -> Packed:
    """Return one character an item where hits are of few tries, to keep rows short; else numbers.

    0 or 1 as "0110"; of three tries the number that hit, as "3:0312". NaN, an item that was not
    asked about, is "-" among characters and None among numbers.
    """
    for tries in range(1, 10):
        counts = [-1 if math.isnan(hit) else round(hit * tries) for hit in hits]
        if all(
            n == -1 or (0 <= n <= tries and abs(hit * tries - n) < 1e-6)
            for hit, n in zip(hits, counts, strict=True)
        ):
            return f"{tries}:" * (tries > 1) + "".join("-" if n < 0 else str(n) for n in counts)
    return [None if math.isnan(hit) else round(hit, 4) for hit in hits]


def unpack(hits: Packed) -> list[float]:
    """Return the items' hits that `pack` made shorter."""
    if isinstance(hits, str):
        tries, of_several, counts = hits.rpartition(":")
        whole = int(tries) if of_several else 1
        return [math.nan if n == "-" else int(n) / whole for n in counts]
    return [math.nan if hit is None else float(hit) for hit in hits]
