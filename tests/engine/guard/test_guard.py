"""Steps that would spoil a run: undone bit for bit by every optimiser, told of, and limited."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from m3i_fast.config import TrainConfig
from m3i_fast.config.guard import GuardConfig
from m3i_fast.config.objective.balance import BalanceConfig
from m3i_fast.config.optim import OptimConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.guard.guard import Guard, SpikeDetector, not_finite
from m3i_fast.engine.guard.skipped_steps import SKIPPED_ROW
from m3i_fast.engine.optim.ema import update_ema
from m3i_fast.engine.optim.optimizers import set_schedules
from m3i_fast.engine.optim.schedules import lr_schedule
from m3i_fast.engine.parallel.local_shards import GradientNorm
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.observe.metrics import DeviceMeans, read_jsonl
from m3i_fast.recipes import demo, demo_method, shrink
from tests.engine.guard.guard_work import SHARDS, Poisoned, work
from tests.shared.engine import fused_stand_ins
from tests.shared.engine import optimiser_runs as runs
from tests.shared.engine.replaced_step import replace_call
from tests.shared.engine.small_run import TEXT
from tests.shared.engine.two_ranks import NUM_RANKS
from tests.shared.ranks import start_ranks

OPTIMISERS = {
    "adamw": OptimConfig(lr=0.01, weight_decay=0.1),
    "muon": OptimConfig(lr=0.01, weight_decay=0.1, matrices="muon"),
    "lamb": OptimConfig(name="lamb", lr=0.02, weight_decay=0.1),
    "lars": OptimConfig(name="lars", lr=4.0, weight_decay=0.1),
    "te": OptimConfig(impl="te", lr=0.01, weight_decay=0.1),
    "apex": OptimConfig(impl="apex", lr=0.01, weight_decay=0.1),
    "apex_lamb": OptimConfig(name="lamb", impl="apex", lr=0.01, weight_decay=0.1),
}
# Methods that write in the forward pass, with what they write.
WRITING = {
    "dino": "centre",
    "densecl": "queue",
    "unigrad": "correlation",
    "byol": "running_var",
    "balanced": "balance.norm",
}


def _config(dataset: Path, cfg: TrainConfig | None = None, **overrides: object) -> TrainConfig:
    cfg = shrink(cfg or demo(), path=dataset, num_classes=9, text=TEXT)
    cfg = replace(
        cfg,
        num_threads=1,
        num_steps=8,
        log_every=4,
        checkpoint_every=4,
        keep_checkpoints=9,
        data=replace(cfg.data, batch_size=8),
        optim=replace(cfg.optim, matrices="adamw"),
    )
    return replace(cfg, **overrides)  # type: ignore[arg-type]


def _named(dataset: Path, name: str) -> TrainConfig:
    if name != "balanced":
        return _config(dataset, demo_method(name))
    balance = BalanceConfig(mode="gradient_norm", every=1)
    return _config(dataset, replace(demo(), objective=replace(demo().objective, balance=balance)))


def _state(model: nn.Module, optimizer: object) -> dict[str, Tensor]:
    tensors = checkpoint.tensors_of(model, optimizer)  # type: ignore[arg-type]
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _different(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


# ---- Optimisers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("case", OPTIMISERS)
def test_a_skipped_step_never_was(case: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at once nor in the steps that follow, from the first step on."""
    fused_stand_ins.apex(monkeypatch)
    fused_stand_ins.transformer_engine(monkeypatch)
    monkeypatch.setattr("m3i_fast.engine.optim.optimizers._expect_usable", lambda *_: None)
    cfg, model, twin = OPTIMISERS[case], runs.small_vit(), runs.small_vit()
    optimizers = [runs.run(cfg, vit, steps=range(at)) for vit in (model, twin)]
    before = _state(model, optimizers[0])
    runs.set_gradients(model, 0)
    for p in model.parameters():
        assert p.grad is not None
        p.grad.fill_(float("nan"))
    set_schedules(optimizers[0], lr=0.5, weight_decay=0.5)
    optimizers[0].step(torch.ones(()))
    if at:
        assert _different(_state(model, optimizers[0]), before) == []
    optimizers[0].zero_grad()
    for vit, optimizer in zip((model, twin), optimizers, strict=True):
        for step in range(at, at + 3):
            set_schedules(optimizer, lr=0.01, weight_decay=0.1)
            runs.set_gradients(vit, step)
            optimizer.step(torch.zeros(()))
            optimizer.zero_grad()
    ours, theirs = _state(model, optimizers[0]), _state(twin, optimizers[1])
    assert _different(ours, theirs) == []
    assert all(tensor.isfinite().all() for tensor in ours.values())
    moved = [n for n in ours if n in before and not torch.equal(ours[n], before[n])]
    assert len(moved) > 20


def test_an_average_takes_no_part_in_a_skipped_step() -> None:
    online = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    average = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    online(torch.randn(16, 4))
    before = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    update_ema(average, online, 0.5, torch.ones(()))
    assert _different(average.state_dict(), before) == []
    update_ema(average, online, 0.5, torch.zeros(()))
    for name, tensor in average.state_dict().items():
        moved = online.state_dict()[name]
        if "running" not in name and "num" not in name:
            moved = (before[name] + moved) / 2
        torch.testing.assert_close(tensor, moved)


# ---- Steps of a run ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("name", WRITING)
def test_what_the_forward_pass_wrote_is_undone(
    name: str, kind: str, dataset: Path, tmp_path: Path
) -> None:
    trainer = Poisoned(_named(dataset, name), tmp_path / "run").poisoned({1: kind})
    states = []
    for _ in range(3):
        trainer.train_step(next(trainer.loader))
        states.append({k: v.clone() for k, v in trainer.tensors().items()})
    trainer.loader.close()
    first, skipped, third = states
    assert _different(skipped, first) == []
    changed = _different(third, skipped)
    assert any(WRITING[name] in key for key in changed)
    assert any(key.startswith("optimizer/") and key.endswith("/step") for key in changed)
    trainer.run.close()


def test_a_resume_in_between_is_the_whole_run_and_tells_the_same(
    dataset: Path, tmp_path: Path
) -> None:
    """Stopped after skipped steps that no row tells of yet, while spikes are watched."""
    guard = GuardConfig(spikes="skip", spike_window=2, backoff_after=2)
    cfg = _config(dataset, guard=guard, num_steps=12, log_every=6)
    poison: dict[int, str | float] = {2: "loss", 3: "gradient", 7: 9.0}
    whole = Poisoned(cfg, tmp_path / "whole").poisoned(poison)
    whole.train()
    first = Poisoned(cfg, tmp_path / "part").poisoned(poison)
    take = first.train_step.__call__

    def stopped(batch, *, monitor=False):  # type: ignore[no-untyped-def]
        first._stop.signal = 15 if first.step == 3 else None
        return take(batch, monitor=monitor)

    replace_call(first, stopped)
    assert first.train().step == 4
    # As a run leaves it that went on from there and was killed: all of it is told again.
    shutil.copy(tmp_path / "whole" / "skipped.jsonl", tmp_path / "part" / "skipped.jsonl")
    second = Poisoned(cfg, tmp_path / "part", resume=True).poisoned(poison)
    second.train()
    assert first.batches + second.batches == whole.batches
    assert first.rates + second.rates == whole.rates
    assert _different(second.tensors(), whole.tensors()) == []
    rows = [read_jsonl(tmp_path / run / "skipped.jsonl", SKIPPED_ROW) for run in ("whole", "part")]
    assert rows[0] == rows[1]
    assert [(row["step"], row["reason"]) for row in rows[0]] == [
        (2, "not finite"),
        (3, "not finite"),
        (7, "spike"),
    ]
    assert [row["sample_ids"] for row in rows[0]] == [[whole.batches[step]] for step in (2, 3, 7)]
    assert rows[0][0]["losses"][0]["loss/total"] == "inf"  # type: ignore[index]
    logged = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert [row["guard/skipped"] for row in logged] == [2, 1]
    assert all(math.isfinite(value) for row in logged for value in row.values())
    # Schedules go on, and two in a row halve the learning rate from the read on.
    scale = np.where(np.arange(12) < 6, 1.0, 0.5)
    np.testing.assert_allclose(whole.rates, lr_schedule(cfg.optim, 12) * scale)
    assert logged[1]["optim/lr"] == whole.rates[-1]


def test_means_leave_skipped_steps_out() -> None:
    means, other = DeviceMeans(), DeviceMeans()
    for value, skip in ((1.0, 0.0), (math.nan, 1.0), (4.0, 0.0)):
        means.add({"a": torch.tensor(value), "b": torch.tensor(2 * value)}, torch.tensor(skip))
    means.add({"a": torch.tensor(7.0)})
    assert means.read() == {"a": 4.0, "b": 5.0}
    other.load_state_dict(json.loads(json.dumps(means.state_dict())))
    assert other.read() == means.read()
    other.load_state_dict({"a": [6.0, 3]})  # of a checkpoint of before
    assert other.read() == {"a": 2.0}
    means.reset()
    means.add({"a": torch.tensor(math.inf)}, torch.ones(()))
    assert means.read() == {}


def test_too_many_skipped_steps_end_the_run_with_a_dump(dataset: Path, tmp_path: Path) -> None:
    cfg = _config(dataset, guard=GuardConfig(max_in_a_row=3), log_every=1)
    poison: dict[int, str | float] = {4: "gradient", 5: "loss", 6: "gradient"}
    trainer = Poisoned(cfg, tmp_path / "run").poisoned(poison)
    with pytest.raises(FloatingPointError, match="3 steps in a row.*--guard.max-in-a-row 3") as err:
        trainer.train()
    dump = tmp_path / "run" / "dump_step_00000007"
    assert str(dump) in str(err.value) and "gradient of encoder." in str(err.value)
    found = json.loads((dump / "rank_0.json").read_text())
    assert found["last_skipped"]["sample_ids"] == trainer.batches[6]
    spoilt = [n for n, value in found["last_skipped"]["gradients"].items() if value == "nan"]
    assert len(spoilt) == 1
    [group] = [g for g in found["groups"] if g["gradient_norm"] == "nan"]
    weight = trainer.objective.get_parameter(spoilt[0])
    assert group["weight_norms"][spoilt[0]] == pytest.approx(float(weight.detach().norm()))
    assert TrainConfig.load(dump / "config.json") == cfg
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").step == 4


def test_a_share_of_steps_is_limited(dataset: Path, tmp_path: Path) -> None:
    cfg = _config(dataset, guard=GuardConfig(max_share=0.001), log_every=1)
    trainer = Poisoned(cfg, tmp_path / "run").poisoned({1: "gradient", 3: "gradient"})
    with pytest.raises(FloatingPointError, match="2 of the last 1000 steps.*--guard.max-share"):
        trainer.train()
    assert trainer.step == 4


def test_weights_that_are_not_finite_are_never_saved(dataset: Path, tmp_path: Path) -> None:
    trainer = Poisoned(_config(dataset), tmp_path / "run").poisoned({})
    moment = trainer.objective.encoder.get_parameter("norm.weight")
    trainer.train_step(next(trainer.loader))
    trainer.optimizer.state[moment]["exp_avg"][0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"not finite: optimizer/encoder.norm.weight/exp"):
        trainer.save()
    assert checkpoint.checkpoints(tmp_path / "run" / "checkpoints") == []
    trainer.loader.close()
    trainer.run.close()


def test_what_an_optimiser_counts_on_the_host_is_left_out() -> None:
    """Apex's and Transformer Engine's, whose weights and moments are on the GPU."""
    world = World(torch.device("cpu"))
    moment, step = torch.tensor([1.0, 2.0, math.nan]), torch.empty((), device="meta")
    assert not_finite({"m": moment, "step": step, "none": torch.empty(0)}, world) == ["m"]
    assert not_finite({"m": moment[:2], "step": step}, world) == []


@pytest.mark.parametrize(
    "name", ["model/target_encoder.encoder.norm.weight", "optimizer/encoder.norm.weight/exp_avg"]
)
def test_what_is_not_finite_ends_the_run_at_the_next_row(
    name: str, dataset: Path, tmp_path: Path
) -> None:
    """An average or a moment, and not at a checkpoint long after, which could not be written."""
    trainer = Poisoned(_config(dataset, checkpoint_every=1000), tmp_path / "run").poisoned({})
    step = trainer.train_step.__call__

    def spoilt(batch, *, monitor=False):  # type: ignore[no-untyped-def]
        metrics = step(batch, monitor=monitor)
        if trainer.step == 2:
            tensors = checkpoint.tensors_of(trainer.objective, trainer.optimizer)
            tensors[name][0] = math.nan
        return metrics

    replace_call(trainer, spoilt)
    with pytest.raises(FloatingPointError, match=f"step 4: .*not finite: .*{name}"):
        trainer.train()
    assert trainer.step == 4
    assert checkpoint.checkpoints(tmp_path / "run" / "checkpoints") == []


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("norm", [1.0, math.inf])
def test_a_loss_that_is_not_finite_is_enough(loss: float, norm: float) -> None:
    """A loss may be infinite while its gradient is finite: that of a clamped value, for one."""
    guard = Guard(GuardConfig(), nn.Linear(1, 1), World(torch.device("cpu")))
    gradients = GradientNorm(torch.tensor(norm), torch.ones(1))
    guard.judge({"loss/total": torch.tensor(loss)}, gradients)
    assert guard.skip == 1
    guard.judge({"loss/total": torch.tensor(1.0)}, GradientNorm(torch.tensor(1.0), torch.ones(1)))
    assert guard.skip == 0


# ---- Spikes --------------------------------------------------------------------------------------


def test_spikes_are_those_of_a_loop_in_numpy() -> None:
    rng = np.random.default_rng(0)
    losses = np.exp(-np.arange(60) / 30) + 0.05 * rng.standard_normal(60)
    losses[[3, 25, 40]] += 2.0  # the first one comes before there is a mean
    losses[50] = math.nan
    window, deviations = 10, 5.0
    spikes = SpikeDetector(
        GuardConfig(spike_window=window, spike_deviations=deviations), torch.device("cpu")
    )
    found, seen = [], list[float]()
    mean = square = 0.0
    for step, loss in enumerate(losses):
        spike = len(seen) >= window and loss - mean > deviations * math.sqrt(square - mean**2)
        if bool(spikes.update(torch.tensor(loss), torch.tensor(math.isnan(loss)))):
            found.append(step)
        assert spike == (step in found)
        if not spike and not math.isnan(loss):
            seen.append(loss)
            rate = max(1 / len(seen), 1 / window)
            mean, square = mean + rate * (loss - mean), square + rate * (loss**2 - square)
    assert found == [25, 40]
    assert spikes.state_dict() == pytest.approx([len(seen), mean, square - mean**2])


def test_a_spike_goes_back_and_passes_its_batches_over(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guard = GuardConfig(spikes="rollback", spike_window=2, max_rollbacks=1, spike_deviations=50.0)
    cfg = _config(dataset, guard=guard, num_steps=8, log_every=3, checkpoint_every=2)
    trainer = Poisoned(cfg, tmp_path / "run").poisoned({4: 1e3})
    plain = Poisoned(cfg, tmp_path / "plain").poisoned({})
    at_four: dict[str, Tensor] = {}
    step, again = trainer.train_step.__call__, list[int]()

    def noted(batch, *, monitor=False):  # type: ignore[no-untyped-def]
        again.append(trainer.step)
        if trainer.step == 4 and at_four:
            trainer.poison = {}
            assert _different(trainer.tensors(), at_four) == []
        elif trainer.step == 4:
            at_four.update({k: v.clone() for k, v in trainer.tensors().items()})
        return step(batch, monitor=monitor)

    replace_call(trainer, noted)
    assert trainer.train().step == 8
    assert again == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert "ROLLED BACK to step 4, from step 6, for the spike at step 4" in caplog.text
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [3, 6, 8]
    # No batch comes twice: those of the spike are passed over.
    batches = [next(plain.loader).sample_id.tolist() for _ in range(10)]
    assert trainer.batches == batches
    kept = [c.step for c in checkpoint.checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == [2, 4, 6, 8]
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest.state()["skips"]["rollbacks"] == 1
    plain.loader.close()
    plain.run.close()

    trainer = Poisoned(cfg, tmp_path / "twice").poisoned({4: 1e3})
    with pytest.raises(FloatingPointError, match="after 1 rollbacks, --guard.max-rollbacks 1"):
        trainer.train()


# ---- Ranks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_ranks(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    cfg = _config(dataset, _named(dataset, "dino"), num_steps=4, log_every=4)
    start_ranks(work, (cfg, folder), NUM_RANKS)
    return folder


@pytest.mark.parametrize("shard", SHARDS)
def test_what_one_rank_sees_is_skipped_by_all(shard: int, of_ranks: Path) -> None:
    """An infinite loss and a gradient of NaN on the second rank, weights whole and spread."""
    found = [
        torch.load(of_ranks / f"{shard}-{rank}.pt", weights_only=True) for rank in range(NUM_RANKS)
    ]
    for states, _ in found:
        assert _different(states[1], states[0]) == []
        assert _different(states[2], states[0]) == []
        assert len(_different(states[3], states[2])) > 20
    assert _different(found[0][0][3], found[1][0][3]) == []
    rows = read_jsonl(of_ranks / f"run-{shard}" / "skipped.jsonl", SKIPPED_ROW)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["sample_ids"] == [batches[row["step"]] for _, batches in found]  # type: ignore[index]
    totals = [losses["loss/total"] for losses in rows[0]["losses"]]  # type: ignore[attr-defined]
    assert totals[1] == "inf" and math.isfinite(totals[0])


def test_ranks_go_back_together(of_ranks: Path) -> None:
    """For a loss that is high on one of them."""
    states = [torch.load(of_ranks / f"back-{rank}.pt", weights_only=True) for rank in range(2)]
    assert _different(states[0], states[1]) == []
    run = of_ranks / "back"
    assert [c.step for c in checkpoint.checkpoints(run / "checkpoints")] == [2, 4, 6]
    assert all(
        checkpoint.latest(run / "checkpoints").state(r)["skips"]["rollbacks"] for r in (0, 1)
    )
    [row] = read_jsonl(run / "skipped.jsonl", SKIPPED_ROW)
    assert (row["step"], row["reason"]) == (4, "spike")


def test_ranks_end_together(of_ranks: Path) -> None:
    """For an average that is not finite on one of them (`work` has seen the error of both)."""
    for rank in range(NUM_RANKS):
        dump = of_ranks / "average" / "dump_step_00000002" / f"rank_{rank}.json"
        assert "model/target_encoder" in json.loads(dump.read_text())["reason"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_in_a_row", 0),
        ("max_share", 0.0),
        ("backoff_after", -1),
        ("backoff_scale", 1.5),
        ("spike_deviations", 0.0),
        ("spike_window", 1),
        ("max_rollbacks", -1),
    ],
)
def test_wrong_values_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"guard\.{name}: expected .*got {value}"):
        GuardConfig(**{name: value})  # type: ignore[arg-type]
