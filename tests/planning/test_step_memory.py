"""Predicted memory of a step against what the CPU's allocator gave to the real one."""

from __future__ import annotations

import gc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.engine.guard.guard import written_buffers
from m3i_fast.planning.step_memory import (
    AVERAGE,
    BUFFERS,
    DECODER,
    ENCODER,
    FROZEN,
    HELD,
    PARAMETERS,
    STATES,
    TEXT,
    block_sizes,
    build_on_meta,
    count_parameters,
    largest_block,
    trace,
)
from m3i_fast.planning.tensor_tracker import CAST_WEIGHTS, GRADIENTS, TensorTracker
from m3i_fast.recipes import recipes, shrink
from tests.shared.engine.real_step import BF16, FP32, stepper

BalanceMode = Literal["gradient_norm", "uncertainty"]


def sized(name: str, batch_size: int) -> TrainConfig:
    cfg = recipes()[name]()
    return replace(cfg, data=replace(cfg.data, batch_size=batch_size))


def small_vit(batch_size: int, **fields: object) -> TrainConfig:
    """The production recipe at 64 pixels."""
    cfg = shrink(recipes()["m3i_vit_b"](), path=Path(), num_classes=9, text=sized("demo", 2).text)
    assert isinstance(cfg.vision, ViTConfig)
    vision = replace(cfg.vision, dim=192, depth=4, num_heads=3, **fields)
    return replace(cfg, vision=vision, data=replace(cfg.data, batch_size=batch_size))


def of_many_prototypes(name: str, batch_size: int) -> TrainConfig:
    """DINO's number, whose likelihood works in blocks of rows."""
    cfg = sized(name, batch_size)
    return replace(cfg, objective=replace(cfg.objective, num_prototypes=65_536))


def small_internimage(batch_size: int) -> TrainConfig:
    cfg = shrink(
        recipes()["m3i_internimage_h"](), path=Path(), num_classes=9, text=sized("demo", 2).text
    )
    return replace(cfg, data=replace(cfg.data, batch_size=batch_size))


def tensors_alive() -> dict[int, int]:
    """Bytes of every storage that a tensor of this process holds."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, torch.nn.Parameter)]
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def measured_peak(cfg: TrainConfig, *, bf16: bool) -> int:
    """Bytes alive before the second step, and the most that the allocator gave during it."""
    of_other_tests = tensors_alive()
    step = stepper(cfg, arithmetic=BF16 if bf16 else FP32)
    step()
    held = sum(size for storage, size in tensors_alive().items() if storage not in of_other_tests)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [
        event
        for event in profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    ]
    given = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        given += event.nbytes()
        most = max(most, given)
    return held + most


DINOV3 = {
    **{"mlp": "swiglu", "position": "rotary", "key_bias": False, "layer_scale_init": 1e-5},
    **{"class_token": True, "num_registers": 4, "norm_eps": 1e-5},
}


def frozen(cfg: TrainConfig) -> TrainConfig:
    return replace(cfg, optim=replace(cfg.optim, freeze_encoder=True))


CASES = {
    "vit, 8": small_vit(8),
    "vit, 32": small_vit(32),
    "vit, recomputed, 32": small_vit(32, activation_checkpointing="full", drop_path_rate=0.1),
    "vit, selective, 32": small_vit(32, activation_checkpointing="selective"),
    "vit of dinov3, 32": small_vit(32, **DINOV3),
    "demo, 32": sized("demo", 32),
    "internimage, 8": sized("demo_internimage", 8),
    "internimage, 16": sized("demo_internimage", 16),
    "internimage, recomputed, 64": small_internimage(64),
    "dino, 16": sized("demo_dino", 16),
    "dino, many prototypes, 16": of_many_prototypes("demo_dino", 16),
    "coca, 16": sized("demo_coca", 16),
    "locca, 16": sized("demo_locca", 16),
    "vit, frozen, 32": frozen(small_vit(32)),
    "internimage, frozen, 16": frozen(sized("demo_internimage", 16)),
}
IN_BF16 = ("vit, 32", "vit of dinov3, 32", "demo, 32", "internimage, 8", "internimage, 16")
RUNS = [*((case, False) for case in CASES), *((case, True) for case in IN_BF16)]
BY_NIGHT = {
    ("vit, 8", False),
    ("vit, 32", True),
    ("internimage, 8", False),
    ("coca, 16", False),
    ("internimage, 16", False),
    ("internimage, 16", True),
    ("demo, 32", True),
    ("vit of dinov3, 32", True),
}


def marks(run: tuple[str, bool]) -> list[pytest.MarkDecorator]:
    return [pytest.mark.matrix, *([pytest.mark.nightly] if run in BY_NIGHT else [])]


@pytest.mark.parametrize(
    ("case", "bf16"),
    [
        case if case == ("demo, 32", False) else pytest.param(*case, marks=marks(case))
        for case in RUNS
    ],
)
def test_the_peak_is_that_of_the_allocator(case: str, bf16: bool) -> None:
    """But for what kernels allocate for themselves: some 3 MiB at these sizes."""
    cfg = CASES[case]
    found = trace(cfg, bf16=bf16, cuda=False)
    measured = measured_peak(cfg, bf16=bf16)
    assert sum(found.peak.values()) == pytest.approx(measured, rel=0.06)


def test_a_production_step_is_traced_without_its_memory() -> None:
    cfg = recipes()["m3i_vit_b_h100"]()
    found = trace(cfg, bf16=True, num_shards=8)
    parameters = count_parameters(build_on_meta(cfg))
    trained = sum(size for part, size in parameters.items() if part != AVERAGE)
    assert found.held[PARAMETERS] == found.gradients == 4 * trained
    assert found.held[AVERAGE] == 4 * parameters[ENCODER] == 4 * parameters[AVERAGE]
    assert found.held[STATES] == pytest.approx(8 * trained, rel=1e-4)
    assert sum(found.peak.values()) > 20 * 2**30
    assert found.activations[ENCODER] > found.activations[DECODER] > 0
    assert found.activations[CAST_WEIGHTS] == pytest.approx(2 * trained, rel=0.3)


def test_a_frozen_encoder_is_no_average_and_has_no_states() -> None:
    cfg = small_vit(8)
    before, now = (count_parameters(build_on_meta(c)) for c in (cfg, frozen(cfg)))
    assert before[FROZEN] == 0 and now[FROZEN] == before[ENCODER] == now[AVERAGE] > 0
    assert now == before | {ENCODER: 0, FROZEN: before[ENCODER]}
    found = trace(frozen(cfg), bf16=False)
    trained = now[TEXT] + now[DECODER] + now["heads"]
    assert found.held[FROZEN] == found.held[AVERAGE] == 4 * now[FROZEN]
    assert found.held[PARAMETERS] == found.gradients == 4 * trained
    assert found.held[STATES] == pytest.approx(8 * trained, rel=1e-3)
    assert ENCODER not in found.activations


def test_wide_norms_of_cuda_cost_an_encoder_of_bf16_maps() -> None:
    """InternImage's maps are bf16 before a norm; CUDA's autocast gives fp32 after it."""
    cfg = sized("demo_internimage", 8)
    cpu, cuda = (trace(cfg, bf16=True, cuda=cuda).activations[ENCODER] for cuda in (False, True))
    assert 1.1 < cuda / cpu < 2


def test_activations_grow_with_the_batch_and_what_is_held_does_not() -> None:
    one, two = (trace(small_vit(size), bf16=False) for size in (16, 32))
    assert two.activations[ENCODER] == pytest.approx(2 * one.activations[ENCODER], rel=0.01)
    for part in HELD[:-1]:
        assert two.held[part] == one.held[part]


def test_recomputation_and_muon_save_memory() -> None:
    plain, selective, full = (
        trace(small_vit(16, activation_checkpointing=a), bf16=False)
        for a in ("none", "selective", "full")
    )
    assert full.activations[ENCODER] < plain.activations[ENCODER] / 3
    assert selective.activations[ENCODER] < plain.activations[ENCODER] * 0.75
    assert full.activations[ENCODER] < selective.activations[ENCODER]
    cfg = small_vit(16)
    muon = trace(replace(cfg, optim=replace(cfg.optim, matrices="muon")), bf16=False)
    assert muon.held[STATES] < plain.held[STATES]


def test_the_tracker_knows_the_peak_where_gradients_are_sharded() -> None:
    with TensorTracker(num_shards=4) as tracker:
        with tracker.within("x"):
            x = torch.ones(750)
        del x
        gradients = []
        for _ in range(10):
            gradients.append(torch.ones(100))
            tracker.book(GRADIENTS, gradients[-1:])
        assert tracker.total == 4000
    assert sum(tracker.peak.values()) == 4000
    assert {part: size for part, size in tracker.sharded_peak.items() if size} == {"x": 3000}


def test_blocks_are_those_that_are_trained() -> None:
    objective = build_on_meta(recipes()["m3i_vit_b"]())
    sizes = block_sizes(objective)
    assert len(sizes) == 12 + 12 + 4  # image, text, decoder; not the EMA copy
    assert max(sizes) == 12 * 768**2 + 13 * 768
    assert set(count_parameters(objective)) >= {ENCODER, DECODER, TEXT}


def test_a_frozen_block_is_gathered_and_trains_nothing() -> None:
    cfg = recipes()["m3i_vit_b"]()
    whole, still = build_on_meta(cfg), build_on_meta(frozen(cfg))
    assert len(block_sizes(still)) == 12 + 4  # text, decoder
    assert largest_block(still) == largest_block(whole) == max(block_sizes(whole))


def test_the_guards_copies_are_held_with_the_buffers() -> None:
    cfg = sized("demo", 8)
    objective = build_on_meta(cfg)
    sizes = [buffer.nbytes for buffer in (*objective.buffers(), *written_buffers(objective))]
    assert len(sizes) > 6
    beside = trace(cfg, bf16=False).held[BUFFERS] - sum(sizes)  # flags and counts of the guard
    assert 0 < beside < 256


@pytest.mark.parametrize("mode", ["gradient_norm", "uncertainty"])
def test_balanced_terms_are_traced_with_what_measures_them(mode: BalanceMode) -> None:
    cfg = sized("demo", 8)
    balanced = replace(cfg.objective, balance=replace(cfg.objective.balance, mode=mode))
    peaks = [trace(c, bf16=True).peak for c in (cfg, replace(cfg, objective=balanced))]
    assert sum(peaks[0].values()) < sum(peaks[1].values())


def test_optimisers_take_as_many_tensors_together_as_on_a_gpu() -> None:
    """LAMB keeps copies of what it steps: of all tensors where a GPU takes them together."""
    cfg = small_vit(2)
    cfg = replace(cfg, optim=replace(cfg.optim, name="lamb"))
    on_cpu, on_gpu = (trace(cfg, bf16=True, cuda=cuda) for cuda in (False, True))
    assert sum(on_gpu.peak.values()) > sum(on_cpu.peak.values()) + on_gpu.held[PARAMETERS]


def test_a_graph_keeps_its_buffers_and_activations() -> None:
    cfg = small_vit(8)
    # Weights are cast one by one in both: in a graph, and where torch.compile does it.
    plain, graphed = (
        trace(
            replace(cfg, compile=not graphs, cuda_graphs="modules" if graphs else "none"), bf16=True
        )
        for graphs in (False, True)
    )
    assert not plain.graphs
    # The target encoder without gradients, the encoder, a decoder for each dense term, the captions
    parameters = count_parameters(build_on_meta(cfg))
    target, encoder, *decoders, text = graphed.graphs
    assert len(decoders) == 2 and target < parameters[ENCODER]
    for kept, part in ((encoder, ENCODER), (text, TEXT)):
        assert 4 * parameters[part] < kept < 6 * parameters[part]
    assert sum(graphed.peak.values()) >= sum(plain.peak.values())


def test_a_frozen_teacher_that_nobody_names_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective\.terms: .*frozen"):
        trace(recipes()["demo_milan"](), bf16=False)


def test_what_an_op_works_in_is_at_the_peak_beside_its_results() -> None:
    scratch = {torch.ops.aten.neg.default: lambda x: 10 * x.nbytes}
    with TensorTracker(scratch=scratch) as tracker, tracker.within("x"):
        a = torch.ones(100)
        b = -a
        assert tracker.bytes["x"] == a.nbytes + b.nbytes == 800
    assert sum(tracker.peak.values()) == 4800


def test_the_tracker_follows_storages_and_not_views() -> None:
    with TensorTracker() as tracker, tracker.within("x"):
        a = torch.ones(1000)
        b = a[10:].view(-1)
        assert tracker.bytes["x"] == 4000
        del a
        assert tracker.bytes["x"] == 4000
        c = torch.zeros(500)
        tracker.book("y", [c])
        del b
    assert tracker.bytes["x"] == 0
    assert tracker.bytes["y"] == 2000
    assert sum(tracker.peak.values()) == 6000


BUCKETS = """
import sys, os, psutil, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(16)))
if sys.argv[1] == "ddp":
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
    model = DistributedDataParallel(model, gradient_as_bucket_view=True)
for _ in range(2):
    model(torch.ones(1, 2048)).sum().backward()
    model.zero_grad(set_to_none=True)
print(psutil.Process().memory_info().rss)
"""


def test_ddp_holds_all_gradients_between_steps(tmp_path: Path) -> None:
    """torch's own: what `ddp_peak` has of a step, from its start to its end."""
    held = {}
    for kind in ("alone", "ddp"):
        command = [sys.executable, "-c", BUCKETS, kind, str(tmp_path / "store")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        held[kind] = int(done.stdout)
    gradients = 16 * 2048 * 2048 * 4
    assert 0.9 * gradients < held["ddp"] - held["alone"] < 1.6 * gradients
