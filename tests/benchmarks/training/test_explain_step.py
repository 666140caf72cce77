"""A step divided by stage and kind of operator: FLOPs are as torch counts, times add up."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from m3i_fast.benchmarks.core.random_batch import draw_any_batch
from m3i_fast.benchmarks.training import explain_step, step
from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vit import vit_demo
from m3i_fast.config.objective.flops import Flops
from m3i_fast.costs.gemm_shapes import gemm_shapes
from m3i_fast.costs.packed_pictures import PackedPictures
from m3i_fast.costs.step_flops import step_flops
from m3i_fast.engine.precision.arithmetic import capabilities_of, resolve_precision
from m3i_fast.objectives.step_context import no_stage
from m3i_fast.pipelines.any_shape.batch import PackedBatch
from m3i_fast.profiling.recording import Activity, HostRange, Recording
from m3i_fast.recipes import recipes
from tests.shared.engine.packed_run import packed_run

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# torch's own counts, which it has registered for attention on a GPU alone.
ATTENTION = {
    FLASH: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    FLASH_BACKWARD: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
}


@pytest.fixture
def recipe() -> TrainConfig:
    """Without a Boltzmann term, whose products torch's counter does not see."""
    made = explain_step.with_batch(recipes()["demo_autoencoder"](), batch_size=4, device="cpu")
    return replace(made, vision=vit_demo(dim=64, depth=1, num_heads=1))


def test_the_stages_have_the_flops_that_torch_counts(recipe: TrainConfig) -> None:
    figures = explain_step.explain(recipe, num_samples=1)
    arithmetic = resolve_precision(
        capabilities_of(torch.device("cpu")),
        gemm_shapes(recipe),
        recipe.precision,
        recipe.backend,
        compiled=False,
    )
    take = explain_step.build_step(recipe, arithmetic, no_stage)
    for _ in range(2):  # those before the recorded one: what is drawn differs from step to step
        take()
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        take()
    assert figures["gflop"] == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-6)
    assert figures["gflop_s"] == pytest.approx(1e3 * figures["gflop"] / figures["step_ms"])


def test_a_gpus_stages_last_as_long_as_their_kernels() -> None:
    """Not as long as the host took to launch them."""
    name = "fwd.input"
    kernels = [
        Activity(name="m3i::gelu", begin=b, end=b + 4000, self_ns=4000, stage=name)
        for b in (5000, 9000)
    ]
    recording = Recording(
        source="",
        device="cuda",
        steps=(HostRange("step", 0, 1000),),
        stages=(HostRange(name, 0, 900),),
        activities=tuple(kernels),
    )
    [row] = explain_step.stage_rows(recording)
    assert (row["ms"], row["host"]) == (pytest.approx(8e-3), 0)


@pytest.mark.parametrize("name", ["dino", "m3i"])
def test_views_of_any_shape_are_one_batch_of_their_budget(name: str) -> None:
    made = packed_run(Path("nowhere"), name, device="cpu")
    figures = explain_step.explain(
        explain_step.with_batch(made, batch_size=2, device="cpu"), num_samples=1
    )
    batch = draw_any_batch(made)
    assert isinstance(batch, PackedBatch) and figures["batch_size"] == batch.batch_size > 2
    lengths = tuple(Counter(batch.lengths(view)) for view in range(len(batch.patches)))
    pictures = PackedPictures(num_steps=1, num_samples=batch.batch_size, lengths=lengths)
    counted = sum(step_flops(made, pictures=pictures).values(), start=Flops()).hardware
    # Boltzmann's kernels are not counted, and attention of each length by itself is.
    assert figures["gflop"] == pytest.approx(counted / 1e9, rel=0.1)


def test_the_times_of_a_stage_add_up_to_it(recipe: TrainConfig) -> None:
    figures = explain_step.explain(recipe, num_samples=1)
    rows = {row["stage"]: row for row in figures["stages"]}
    assert {"Targets", "Encoder", "Backward", "Optimiser", "EMA"} <= rows.keys()
    for row in rows.values():
        parts = sum(row[kind] for kind in (*explain_step.COLUMNS, "ours", "host"))
        assert parts == pytest.approx(row["ms"], rel=0.02, abs=0.01), row
    assert rows["Backward"]["gflop"] > rows["Encoder"]["gflop"] > 0
    assert rows["EMA"]["gflop"] == 0


def test_the_command_prints_the_table_and_refuses_what_is_no_recipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recipe: TrainConfig
) -> None:
    monkeypatch.setattr(step, "recipes", lambda: {"small": lambda: recipe})
    step.main("--explain small --batch-size 4 --num-samples 1 --device cpu".split())
    printed = capsys.readouterr().out
    assert "small on cpu" in printed and "Backward" in printed and "of rate" in printed
    with pytest.raises(SystemExit):
        step.main("--explain large".split())
    assert "explain: expected one of small, got 'large'" in capsys.readouterr().err
