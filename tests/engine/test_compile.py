"""A whole step with compiled blocks: no graph break, no graph too many, the losses of eager."""

from __future__ import annotations

from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from m3i_fast.config import TrainConfig
from m3i_fast.engine.build import blocks_of
from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.recipes import recipes, shrink
from tests.shared.engine.small_run import TEXT

STEPS = 4
# aot_eager computes with eager's kernels. Inductor's fused ones add up in another order, and the
# optimisers divide by the size of a gradient: a last place grows with the steps.
FIRST, LATER = {"aot_eager": 1e-6, "inductor": 1e-5}, {"aot_eager": 1e-6, "inductor": 5e-3}


def _config(name: str, dataset: Path) -> TrainConfig:
    cfg = shrink(recipes()[name](), path=dataset, num_classes=9, text=TEXT)
    return replace(cfg, num_steps=STEPS, num_threads=1, checkpoint_every=STEPS)


def _losses(run: Path) -> list[dict[str, float]]:
    return [
        {
            name: value
            for name, value in row.items()
            if name.startswith(("loss/", "optim/grad", "gradient/"))
        }
        for row in read_jsonl(run / "metrics.jsonl")
    ]


RUNS = (("demo", False), ("demo_internimage", False), ("demo", True), ("demo_cappa", False))
SLOW, NIGHTLY = [pytest.mark.matrix], [pytest.mark.matrix, pytest.mark.nightly]


@pytest.mark.parametrize(
    ("name", "freeze", "backend"),
    [
        *((*run, "aot_eager") for run in RUNS),
        *(
            pytest.param(*run, "inductor", marks=NIGHTLY if "internimage" in run[0] else SLOW)
            for run in RUNS
        ),
    ],
)
def test_compiled_blocks_train_as_eager_ones(
    name: str,
    freeze: bool,
    backend: str,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """aot_eager traces the same graphs forward and backward, and leaves out the C++."""
    cfg = _config(name, dataset)
    cfg = replace(cfg, optim=replace(cfg.optim, freeze_encoder=freeze))
    Trainer(cfg, tmp_path / "eager").train()
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    trainer = Trainer(replace(cfg, compile=True), tmp_path / "compiled")
    blocks = blocks_of(trainer.objective)
    assert blocks and all(block._compiled_call_impl is not None for block in blocks)
    graphs: list[int] = []
    trainer.train(lambda *_: graphs.append(counters["stats"]["unique_graphs"]))
    assert not counters["graph_break"] and not counters["unimplemented"]
    torch._dynamo.reset()
    assert graphs[0] > 0 and graphs == [graphs[0]] * STEPS  # later steps compile nothing
    ours, theirs = _losses(tmp_path / "compiled"), _losses(tmp_path / "eager")
    assert len(ours) == STEPS
    assert ours[0] == pytest.approx(theirs[0], rel=FIRST[backend])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert a == pytest.approx(b, rel=LATER[backend])
