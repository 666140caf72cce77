"""Scaling: figures by hand, a model whose planted parameters are found, two real ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from m3i_fast.benchmarks.core.random_batch import Repeated, draw_batch
from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.scaling import main as scaling
from m3i_fast.benchmarks.scaling import ranks as scaling_ranks
from m3i_fast.benchmarks.scaling.config import Config, parse
from m3i_fast.benchmarks.scaling.figures import efficiency, ratio, serial_fraction, share_lost
from m3i_fast.benchmarks.scaling.model import (
    Model,
    Observation,
    Workload,
    fit,
    leave_one_out,
    num_buckets,
    predict,
    predicted_points,
    workload,
)
from m3i_fast.config import TrainConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.objective.flops import Flops
from m3i_fast.costs.gpus import CARDS
from m3i_fast.costs.roofline import StepCost
from m3i_fast.costs.roofline import predict as roofline
from m3i_fast.costs.traffic import Nodes, Traffic, all_reduce, ddp, total
from m3i_fast.engine.trainer import Trainer
from m3i_fast.planning.step_memory import build_on_meta, count_parameters
from m3i_fast.recipes import demo, recipes, shrink

CARD = CARDS["h100"]
PLANTED = Model(fixed_s=2e-3, s_per_flop=3e-15, latency_s=4e-6, slowdown=1.7)
COUNTS = (1, 2, 4, 8, 16, 64, 1024)
NUM_PARAMETERS = 300_000_000


# ---- Figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("serial", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("num_ranks", [2, 8, 1024])
def test_the_serial_fraction_is_the_one_in_amdahls_law(serial: float, num_ranks: int) -> None:
    speed_up = 1 / (serial + (1 - serial) / num_ranks)
    assert serial_fraction(speed_up / num_ranks, num_ranks) == pytest.approx(serial)


def test_efficiency_and_shares_by_hand() -> None:
    found = efficiency([300.0, 320.0, 340.0], [100.0, 100.0], num_ranks=4)
    assert (found.value, found.ci_low, found.ci_high) == pytest.approx((0.8, 0.75, 0.85))
    assert efficiency([7.0], [5.0], num_ranks=1).value == 1.0
    assert serial_fraction(1.0, 1) is None
    lost = share_lost([2.0, 2.0, 4.0], [1.0])
    assert (lost.value, lost.ci_low, lost.ci_high) == pytest.approx((0.5, 0.5, 0.75))


def test_the_interval_of_a_ratio_covers_it_as_often_as_it_says() -> None:
    rng, covered = random.Random(0), 0
    for trial in range(200):
        above, below = ([rng.gauss(mean, 1.0) for _ in range(25)] for mean in (30.0, 10.0))
        found = ratio(above, below, seed=trial)
        covered += found.ci_low <= 3.0 <= found.ci_high
    assert 0.90 <= covered / 200 <= 0.99


# ---- The model -----------------------------------------------------------------------------------


def work(num_ranks: int, *, batch: int = 64, hops: int = 0, rows: float = 0.0) -> Workload:
    """DDP of 300 M parameters; the forward pass is a third of the products."""
    nodes = Nodes(num_ranks, 8)
    several = num_ranks > 1
    forward = batch * 10**11
    return Workload(
        nodes=nodes,
        batch_size=batch,
        products=Flops(forward=forward, backward=2 * forward),
        gradients=total(ddp(nodes, num_parameters=NUM_PARAMETERS)),
        num_collectives=num_buckets(4 * NUM_PARAMETERS) if several else 0,
        candidates=Traffic(rows, 0.0) if several else Traffic(),
        candidate_hops=hops if several else 0,
    )


def observe(of: Workload, noise: Callable[[], float] = lambda: 1.0) -> Observation:
    """What the planted model does, by its formulas written out here."""
    nodes, products = of.nodes, of.products
    compute = PLANTED.fixed_s + PLANTED.s_per_flop * products.hardware

    def all_reduce_s(size: float, count: int) -> float:
        own = all_reduce(nodes, size)
        links = max(own.nvlink / CARD.nvlink_byte_s, own.network / CARD.network_byte_s)
        ring = 2 * (nodes.local - 1) + 2 * (nodes.count - 1)
        return PLANTED.slowdown * links + count * ring * PLANTED.latency_s

    sizes = (4096, 2**20, 25 * 2**20) if nodes.num_ranks > 1 else ()
    sent = all_reduce_s(4 * NUM_PARAMETERS, of.num_collectives)
    backward = PLANTED.s_per_flop * products.backward
    return Observation(
        workload=of,
        alone_s=compute * noise(),
        step_s=(compute + max(sent - backward, 0.0)) * noise(),
        all_reduces=tuple((size, all_reduce_s(size, 1) * noise()) for size in sizes),
    )


@pytest.mark.parametrize(("spread", "tolerance"), [(0.0, 1e-6), (0.03, 0.06)])
def test_planted_parameters_are_found(spread: float, tolerance: float) -> None:
    """Of steps of up to a node, with batches of a rank in weak and in strong scaling.

    The fixed part is a twentieth of the largest steps, a quarter of the smallest.
    """
    rng = random.Random(1)
    observed = [
        observe(work(count, batch=batch), lambda: 1 + rng.uniform(-spread, spread))
        for count in (1, 2, 4, 8)
        for batch in {64, 64 // count}
    ]
    found = fit(observed, CARD)
    for name in Model.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(PLANTED, name), rel=3 * tolerance), (
            name
        )
    for count in (64, 1024):  # what it is for
        ahead = observe(work(count))
        assert predict(found, ahead.workload, CARD).step_s == pytest.approx(
            ahead.step_s, rel=tolerance
        )
    errors = leave_one_out(observed, CARD)
    of_one = [o.workload.nodes.num_ranks == 1 for o in observed]
    assert [error is None for error in errors] == of_one
    assert max(abs(e) for e in errors if e is not None) <= tolerance


def test_a_step_that_the_model_does_not_know_is_its_error() -> None:
    observed = [observe(work(count)) for count in (1, 2, 4)]
    observed[1] = replace(observed[1], step_s=2 * observed[1].step_s)
    errors = leave_one_out(observed, CARD)
    assert errors[1:] == pytest.approx([-0.5, 0.0], abs=1e-6)


def test_what_is_left_out_is_not_fitted_to() -> None:
    """All-reduces of two ranks take three times as long, a step of theirs does not."""
    observed = [observe(work(count, batch=1)) for count in (2, 4, 8)]
    slow = tuple((size, 3 * seconds) for size, seconds in observed[0].all_reduces)
    observed[0] = replace(observed[0], all_reduces=slow)
    ones = [observe(work(1, batch=batch)) for batch in (1, 64)]
    of_two, *others = leave_one_out([*ones, *observed], CARD)[2:]
    assert of_two == pytest.approx(0.0, abs=1e-6)
    assert all(error is not None and error > 0.01 for error in others)


def test_without_one_rank_there_is_no_model() -> None:
    with pytest.raises(ValueError, match="gpus: expected 1 among them"):
        fit([observe(work(2))], CARD)


def test_of_one_batch_and_one_rank_the_published_rates_are_left() -> None:
    found = fit([observe(work(1))], CARD)
    assert (found.fixed_s, found.latency_s, found.slowdown) == (0.0, 0.0, 1.0)
    assert predict(found, work(1), CARD).step_s == pytest.approx(observe(work(1)).step_s)


def points(model: Model, of: Callable[[int], Workload]) -> list[dict[str, float]]:
    return predicted_points(model, of, CARD, COUNTS)


def test_without_communication_all_ranks_count() -> None:
    def silent(count: int) -> Workload:
        return replace(work(count), gradients=Traffic(), num_collectives=0)

    for point in points(PLANTED, silent):
        assert point["efficiency"] == pytest.approx(1.0)
        assert point["images_s"] == pytest.approx(
            point["ranks"] * points(PLANTED, silent)[0]["images_s"]
        )


def test_more_ranks_and_slower_links_cost_more() -> None:
    slow = replace(PLANTED, slowdown=20.0, latency_s=1e-3)
    for model in (PLANTED, slow):
        found = points(model, lambda n: work(n, hops=2 * n, rows=1e6 * n))
        scaled = [point["efficiency"] for point in found]
        assert scaled == sorted(scaled, reverse=True) and scaled[0] == 1.0 > scaled[-1] > 0.0
    for fast, slower in zip(points(PLANTED, work), points(slow, work), strict=True):
        assert slower["step_ms"] >= fast["step_ms"] > 0.0
    assert points(slow, work)[-1]["exposed_ms"] > 0.0


def test_what_the_backward_pass_hides_costs_nothing() -> None:
    fast = replace(PLANTED, slowdown=1e-3, latency_s=0.0)
    found = points(fast, work)
    assert [p["exposed_ms"] for p in found] == [0.0] * len(COUNTS)
    hidden = predict(fast, work(1024), CARD)
    assert 0.0 < hidden.gradients_s < hidden.backward_s


def test_at_published_rates_it_is_the_roofline_of_the_plan() -> None:
    """Which knows no latency, and of the products nothing but a share of the peak."""
    of = work(64, rows=1e8)
    peak = 0.4 * CARD.bf16_flop_s
    model = Model(fixed_s=0.0, s_per_flop=1 / peak, latency_s=0.0, slowdown=1.0)
    expected = roofline(
        StepCost(
            batch_size=of.batch_size,
            flops={"all": of.products},
            bf16=True,
            moved_bytes=0.0,
            sent={"gradients": of.gradients, "candidates": of.candidates},
            loader_images_s=1e9,
        ),
        CARD,
        num_ranks=64,
    )
    found = predict(model, of, CARD)
    assert found.step_s == pytest.approx(expected.step_s)
    assert found.candidates_s == pytest.approx(expected.candidates_s) and found.candidates_s > 0


@pytest.mark.parametrize("shapes", [[(300, 1000)] * 400, [(4096,)] * 900, [(5000, 5000)] * 3])
def test_buckets_are_those_of_ddp(shapes: Sequence[tuple[int, ...]]) -> None:
    """But for tensors that do not fill them evenly."""
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    buckets, _ = dist._compute_bucket_assignment_by_size(tensors, [2**20, 25 * 2**20])
    found = num_buckets(sum(tensor.numel() * 4 for tensor in tensors))
    largest = max(tensor.numel() * 4 for tensor in tensors)
    if largest > 25 * 2**20:  # a bucket is never less than a tensor
        assert len(buckets) == len(tensors) <= found
    else:
        assert abs(found - len(buckets)) <= 1


def test_how_many_buckets_there_are_at_their_edges() -> None:
    first, full = 2**20, 25 * 2**20
    sizes = (4, first, first + 4, first + full, first + full + 4)
    assert [num_buckets(size) for size in sizes] == [1, 1, 2, 2, 3]


def test_the_workload_of_a_recipe() -> None:
    cfg = recipes()["m3i_vit_s_h100"]()
    parameters = count_parameters(build_on_meta(cfg))
    one, many = (workload(cfg, CARD, Nodes(n, 8), parameters) for n in (1, 64))
    assert (one.num_collectives, one.candidate_hops) == (0, 0)
    assert one.gradients == one.candidates == Traffic()
    assert many.candidate_hops == 4 * 63 + 1 and many.candidates.network > 0
    assert many.products.hardware > one.products.hardware  # captions of all ranks
    sharded = replace(cfg, parallel=replace(cfg.parallel, shard=-1))
    # In bf16 weights before and after every pass, of the average too: more than fp32 gradients.
    more = workload(sharded, CARD, Nodes(64, 8), parameters).gradients
    assert more.network > 0.9 * many.gradients.network and more != many.gradients


# ---- Requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpus 2,4", "--gpus: expected 1 among them"),
        ("--gpus 1,1", "--gpus: expected rising numbers"),
        ("--gpus 1,3 --global-batch 32", "--global-batch: expected a multiple of 6.*as 30, got 32"),
        ("--gpus 1,2,4 --data.batch-size 2", "expected a multiple of 8.*as 8, got 2"),
        ("--card v100", "--card: expected one of a100.*got 'v100'"),
    ],
)
def test_what_is_refused_before_any_rank_starts(arguments: str, message: str) -> None:
    cfg = parse(["demo", "--device", "cpu", *arguments.split()])
    with pytest.raises(ValueError, match=message):
        next(scaling.rows_of(cfg))


def test_what_is_refused_by_itself() -> None:
    with pytest.raises(ValueError, match="--predict: expected multiples of --gpus-per-node 8"):
        Config(predict="12")
    with pytest.raises(ValueError, match="--windows: expected at least 1, got 0"):
        Config(windows=0)
    accumulating = replace(demo(), parallel=replace(demo().parallel, accumulate=2))
    with pytest.raises(ValueError, match="parallel.accumulate: expected 1"):
        Config(config=accumulating)


def test_strong_scaling_shares_a_batch() -> None:
    cfg = parse(["demo", "--device", "cpu", "--global-batch", "24"])
    assert [cfg.of_ranks("strong", n).data.batch_size for n in (1, 2, 4)] == [24, 12, 6]
    assert cfg.of_ranks("weak", 4).data.batch_size == demo().data.batch_size
    assert cfg.of_ranks("weak", 4).num_threads == 1


# ---- Two real ranks ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = TextConfig(vocab_size=814, context_length=24, dim=32, depth=1, num_heads=2, embed_dim=32)
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    shrink(demo(), path=Path("none"), num_classes=9, text=text).save(path)
    return path


def test_gradients_are_reduced_in_the_windows_that_say_so(tiny: Path, tmp_path: Path) -> None:
    """A group of one rank: DDP reduces all the same, and a hook of its own sees each bucket."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        cfg = replace(TrainConfig.load(tiny), device="cpu")
        data = Repeated(draw_batch(cfg))
        trainer = Trainer(replace(cfg, num_steps=9), tmp_path / "run", data=data)
        buckets: list[int] = []

        def see(_, bucket):  # type: ignore[no-untyped-def]  # DDP takes no annotations as text
            buckets.append(bucket.index())
            found: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            found.set_result(bucket.buffer())
            return found

        assert scaling_ranks._kinds(trainer) == ("together", "unreduced")
        trainer.train_step.model.register_comm_hook(None, see)  # type: ignore[operator]
        scaling_ranks._window(trainer, "unreduced", 2)
        assert trainer.step == 2 and not buckets
        scaling_ranks._window(trainer, "together", 3)
        assert trainer.step == 5 and len(buckets) >= 3
        trainer.close()
    finally:
        dist.destroy_process_group()


def test_two_ranks_are_measured_and_recorded(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "7")  # as in a job that is no part of this
    monkeypatch.setattr(scaling, "console", Console(width=200))
    options = "--device cpu --gpus 1,2 --mode weak --windows 3 --window-steps 1 --warmup-steps 1"
    scaling.main(["--config", str(tiny), *options.split()])
    rows = list(ledger.read_rows("scaling", folder=tmp_path))
    one, two, ahead = (row["figures"] for row in rows)
    assert [f["kind"] for f in (one, two, ahead)] == ["measured", "measured", "predicted"]
    assert {row["config"]["data"]["batch_size"] for row in rows} == {4}
    assert ["telemetry" in row for row in rows] == [True, True, False]
    _check_measured(one, two)
    points = {point["ranks"]: point for point in ahead["points"]}
    assert list(points) == [16, 32, 64, 128, 256, 512, 1024]
    assert points[1024]["efficiency"] < points[16]["efficiency"] < 1.0
    assert ahead["leave_one_out_error"].keys() == {"2"}
    assert ahead["model"]["s_per_flop"] > 0 and ahead["fitted_to_ranks"] == [1, 2]
    printed = capsys.readouterr().out
    assert "PREDICTED, not measured" in printed and "1,024*" in printed
    _check_picture(tmp_path / "scaling.svg", ahead)


def _check_measured(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert (one["ranks"], two["ranks"], two["num_threads"]) == (1, 2, 1)
    assert one["step_ms"].keys() == {"together", "alone"}
    assert two["step_ms"].keys() == {"together", "alone", "unreduced"}
    assert one["step_ms"]["together"] == one["step_ms"]["alone"]
    rates = [row["images_s"]["median"] for row in (one, two)]
    for row, rate in zip((one, two), rates, strict=True):
        median = row["step_ms"]["together"]["median"]
        # Of three windows the median of rates is the rate of the median.
        assert rate == pytest.approx(1e3 * 4 * row["ranks"] / median)
        flops = row["model_flops"]
        assert 0 < flops["mfu"] == flops["model_flop_s"] / flops["peak_flop_s"] < 1
        assert all(0 < stages["time/bwd_ms"] for stages in row["stages_ms_by_rank"])
    scaled = two["efficiency"]
    assert scaled["value"] == pytest.approx(rates[1] / (2 * rates[0]))
    assert scaled["ci_low"] <= scaled["value"] <= scaled["ci_high"]
    together, alone = (two["step_ms"][kind]["median"] for kind in ("together", "alone"))
    assert two["communication_share"]["value"] == pytest.approx(1 - alone / together)
    assert one["communication_share"] is one["reduction_share"] is None
    assert one["karp_flatt"]["serial_fraction"] is None
    assert two["all_reduce_s"].keys() == {"4096", str(2**20), str(25 * 2**20)}
    assert len(two["loss"]) == 2 and two["loss"][0] == two["loss"][1]  # ranks that train together
    assert two["loss"] != one["loss"]


def _check_picture(path: Path, ahead: dict[str, Any]) -> None:
    picture = ElementTree.parse(path).getroot()
    name = "{http://www.w3.org/2000/svg}"
    words = " ".join(str(text.text) for text in picture.iter(f"{name}text"))
    assert "PREDICTED, not measured" in words
    hollow = [c for c in picture.iter(f"{name}circle") if "hollow" in str(c.get("class"))]
    assert len(hollow) == 2 * len(ahead["points"])
    assert all("predicted" in str(circle[0].text) for circle in hollow)
