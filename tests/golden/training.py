"""Parts of training: losses of methods, and what a stored run does when it is resumed."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.pipelines.sources import openmoji
from m3i_fast.recipes import demo, demo_internimage, demo_method, shrink
from tests.golden.differences import STORED

METHODS = (
    *("m3i", "siameseim", "mae", "data2vec", "simclr", "byol", "vicreg", "dino", "ibot"),
    *("dinov3", "siglip2", "coca"),
)
DATA, RUN = STORED / "data", STORED / "run"
TEXT = TextConfig(
    vocab_size=514, context_length=12, dim=16, depth=1, num_heads=2, embed_dim=16
)  # ids of bytes alone, so that the stored run is small
SAVED, RESUMED = 5, 5  # steps before and after the stored checkpoint
LOGGED = ("loss/", "optim/grad_norm")


def tiny(cfg: TrainConfig, **changes: Any) -> TrainConfig:
    """Return a run of a recipe on the stored data, in fp32, that logs every step."""
    cfg = shrink(cfg, path=DATA, num_classes=9, text=TEXT)
    changes = {"num_threads": 1, "precision": "fp32", "device": "cpu", "log_every": 1} | changes
    return replace(cfg, **changes)


def losses() -> dict[str, Any]:
    """Return losses and gradient norms of 5 steps of each method, and of an InternImage."""
    recipes = {name: demo_method(name) for name in METHODS}
    recipes["m3i, InternImage"] = demo_internimage()
    with TemporaryDirectory() as folder:
        return {
            name: _logged(tiny(cfg, num_steps=5, checkpoint_every=5), Path(folder) / name)
            for name, cfg in recipes.items()
        }


def resume() -> dict[str, Any]:
    """Return what the stored run logs when it is resumed at its checkpoint."""
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        shutil.copytree(RUN, run)
        cfg = TrainConfig.load(run / "config.json")
        cfg = replace(cfg, data=replace(cfg.data, path=DATA))
        return {"logged": _logged(cfg, run, resume=True)}


def _logged(cfg: TrainConfig, run: Path, *, resume: bool = False) -> list[dict[str, Any]]:
    """Train, and return the losses and norms of each new step."""
    first = SAVED + 1 if resume else 1
    Trainer(cfg, run, resume=resume).train()
    return [
        {
            key: value if isinstance(value, int) else float(value).hex()
            for key, value in row.items()
            if key == "step" or key.startswith(LOGGED)
        }
        for row in read_jsonl(run / "metrics.jsonl")
        if row["step"] >= first
    ]


def make_stored_run() -> None:
    """Pack the stored data, and train the stored run up to its checkpoint."""
    for folder in (DATA, RUN):
        shutil.rmtree(folder, ignore_errors=True)
    openmoji.build(DATA, limit=24, max_variants=2, num_merges=0, context_length=12)
    cfg = tiny(demo(), num_steps=SAVED + RESUMED, checkpoint_every=SAVED)
    cfg = replace(cfg, vision=replace(cfg.vision, dim=16, depth=1))
    cfg = replace(cfg, data=replace(cfg.data, path=Path("data")))  # of no machine's folder
    os.chdir(STORED)
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        Trainer(cfg, run).train()
        # As a run that was killed after its first checkpoint, on data that are elsewhere now.
        first = Path("checkpoints") / f"step_{SAVED:08}"
        shutil.copytree(run / first, RUN / first)
        (RUN / "checkpoints" / "latest").write_text(first.name)
        shutil.copy(run / "data.json", RUN)
        cfg.save(RUN / "config.json")
