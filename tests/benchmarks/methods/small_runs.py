"""Settings, runs and rows of the methods' benchmark in the size of a test."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from m3i_fast.benchmarks.ledger.rows import read_rows
from m3i_fast.benchmarks.methods import main as methods
from m3i_fast.benchmarks.methods.main import SUBJECT
from m3i_fast.benchmarks.methods.plan import (
    Config,
    Run,
    recipe_trees,
)
from m3i_fast.config.models.text import TextConfig
from m3i_fast.recipes import DEMO_MERGES, demo

TEXT = TextConfig(
    vocab_size=512 + DEMO_MERGES + 2,
    context_length=demo().text.context_length,
    dim=32,
    depth=1,
    num_heads=2,
    embed_dim=32,
)
SMALL = ("supervised", "dense_distillation", "siameseim", "m3i", "untrained")


def small_config(tmp_path: Path, **changes: Any) -> Config:
    """One thread a run: two threads that share two cores with other tests would spin."""
    places = {"data": tmp_path, "out": tmp_path / "runs", "ledger": tmp_path / "ledger"}
    return Config(**{"jobs": os.cpu_count(), **places, **changes})


def run_of(cfg: Config, method: str) -> Run:
    return cfg.groups[0].run(method, 0, data=methods._data_digest(cfg))


def figures_of(run: Run, **more: Any) -> dict[str, Any]:
    """What a row of the run has, as far as it is found by it."""
    return {**asdict(run), "recipes": recipe_trees(run.method), **more}


def rows_in(cfg: Config) -> list[dict[str, Any]]:
    return [row["figures"] for row in read_rows(SUBJECT, folder=cfg.ledger)]
