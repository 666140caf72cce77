"""The plan of a run: legal batches, the roofline, and what they are put together to."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from m3i_fast.config import ParallelConfig, TrainConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import ViTConfig, vit_b, vit_h, vit_l, vit_s
from m3i_fast.costs.encoder_flops import vit
from m3i_fast.costs.gemm_shapes import gemm_shapes, legal_batches, token_rows
from m3i_fast.costs.gpus import CARDS
from m3i_fast.costs.loader_cost import ENGINES, READING, THREADS, VIEWS
from m3i_fast.costs.roofline import CANDIDATES, StepCost, predict
from m3i_fast.costs.step_flops import counts_of
from m3i_fast.costs.traffic import Nodes, Traffic
from m3i_fast.costs.view_cost import PICTURE
from m3i_fast.engine.parallel.accumulation import expect_additive
from m3i_fast.objectives.methods import CATEGORY
from m3i_fast.planning.plan import (
    Plan,
    Strategy,
    make_plan,
    own_layout,
    refusals_of,
    source_of,
)
from m3i_fast.planning.rank_memory import ADDED_UP, GRAPHS, WORKSPACE
from m3i_fast.planning.step_memory import (
    AVERAGE,
    BATCH,
    FROZEN,
    HELD,
    PARAMETERS,
    STATES,
    trace,
    trained,
)
from m3i_fast.planning.tensor_tracker import GRADIENTS
from m3i_fast.recipes import demo_method, recipes, shrink

TEXT = TextConfig(vocab_size=90, context_length=24, dim=32, depth=2, num_heads=2, embed_dim=32)
ROOT = Path(__file__).parent.parent.parent
ONE, NODE, TWO_NODES = Nodes(1, 8), Nodes(8, 8), Nodes(16, 8)


def small(name: str = "m3i_vit_b", batch_size: int = 8) -> TrainConfig:
    cfg = shrink(recipes()[name](), path=Path("nowhere"), num_classes=9, text=TEXT)
    return replace(cfg, data=replace(cfg.data, batch_size=batch_size))


# ---- Legal batches -------------------------------------------------------------------------------


def classifier(batch_size: int) -> TrainConfig:
    """ViT-B with a class token and nothing but labels: 197 tokens an image."""
    cfg = recipes()["m3i_vit_b"]()
    objective = replace(
        cfg.objective, terms=(CATEGORY,), mixing=replace(cfg.objective.mixing, mode="none")
    )
    data = replace(cfg.data, batch_size=batch_size)
    return replace(cfg, vision=vit_b(class_token=True), objective=objective, data=data)


@pytest.mark.parametrize(
    ("batch_size", "legal"),
    [  # rows of tokens modulo 16, 32 and 128
        (8, [True, False, False, False, False]),
        (16, [True, True, True, False, False]),
        (32, [True, True, True, True, False]),
        (128, [True, True, True, True, True]),
    ],
)
def test_197_tokens_ask_for_a_multiple_of_the_alignment(batch_size: int, legal: list[bool]) -> None:
    found = legal_batches(classifier(batch_size))
    recipes = ["bf16", "fp8_current", "fp8_delayed", "mxfp8", "fp8_block"]
    assert [row.recipe for row in found] == recipes
    assert [row.is_legal for row in found] == legal
    assert token_rows(counts_of(classifier(batch_size))) == {"encoder": 197 * batch_size}


def test_the_nearest_legal_batches() -> None:
    found = {row.recipe: row for row in legal_batches(classifier(100))}
    nearest = {recipe: (row.below, row.above) for recipe, row in found.items()}
    assert nearest == {
        "bf16": (100, 100),
        "fp8_current": (96, 112),
        "fp8_delayed": (96, 112),
        "mxfp8": (96, 128),
        "fp8_block": (None, 128),
    }
    assert "19700 tokens" in found["mxfp8"].reason


def test_mixing_asks_for_whole_inputs_and_every_pass_counts() -> None:
    cfg = recipes()["m3i_vit_b"]()
    mixing = replace(cfg.objective.mixing, num_images=3)
    cfg = replace(
        cfg,
        data=replace(cfg.data, batch_size=48),
        objective=replace(cfg.objective, mixing=mixing),
    )
    found = {row.recipe: row for row in legal_batches(cfg)}
    assert found["bf16"].is_legal
    # 3 images of 65 cells an input; 131 cells of the own view asked of 16 images
    assert token_rows(counts_of(cfg))["cells asked by intra"] == 16 * 131
    assert found["fp8_current"].is_legal
    assert (found["mxfp8"].below, found["mxfp8"].above) == (None, 96)


def test_an_internimage_is_aligned_in_its_last_stage() -> None:
    cfg = recipes()["m3i_internimage_t"]()
    narrow = replace(cfg.objective.decoder, dim=512)
    cfg = replace(
        cfg,
        data=replace(cfg.data, batch_size=32),
        objective=replace(cfg.objective, decoder=narrow),
    )
    counts = token_rows(counts_of(cfg))
    assert counts["encoder"] == 16 * 196
    row = next(row for row in legal_batches(cfg) if row.recipe == "mxfp8")
    assert "the widest is 512 x 512: --fp8-min-dim 512 takes it" in row.reason
    cfg = replace(cfg, fp8_min_dim=512)
    row = next(row for row in legal_batches(cfg) if row.recipe == "mxfp8")
    assert not row.is_legal
    assert f"{16 * 49} tokens" in row.reason  # 16 inputs of 7 x 7 cells


# ---- Speed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vision", "h100", "a100"),
    [
        (vit_s(), 14338, 4523),
        (vit_b(), 3754, 1184),
        (vit_l(), 1071, 338),
        (vit_h(), 407, 128),
    ],
)
def test_images_at_forty_percent_of_the_peak(vision: ViTConfig, h100: int, a100: int) -> None:
    """The peak over three forward passes; of H/14 without its rounded figures: 989 / 1003.8."""
    if vision.patch_size == 14:
        h100, a100 = (round(0.4 * peak / 1003.8e9) for peak in (989e12, 312e12))
    step = {"encoder": vit(replace(vision, class_token=True), 64)}
    work = StepCost(
        batch_size=64, flops=step, bf16=True, moved_bytes=0, sent={}, loader_images_s=float("inf")
    )
    for name, expected in (("h100", h100), ("a100", a100)):
        found = predict(work, CARDS[name], num_ranks=1, utilisation=0.4)
        # attention's scores are computed again, and the gradient of pixels is not
        assert found.images_s == pytest.approx(expected, rel=0.03)
        assert found.mfu == pytest.approx(0.4, rel=0.03)
        assert found.bottleneck == "compute"


def work(**changes: object) -> StepCost:
    flops = {"encoder": vit(vit_b(), 64)}
    plain = StepCost(
        batch_size=64, flops=flops, bf16=True, moved_bytes=1e9, sent={}, loader_images_s=1e9
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "bottleneck"),
    [
        ({}, "compute"),
        ({"moved_bytes": 1e12}, "card memory"),
        ({"sent": {"gradients": Traffic(1e9, 1e11)}}, "communication"),
        ({"sent": {CANDIDATES: Traffic(1e12, 0)}}, "communication"),
        ({"loader_images_s": 100.0}, "loader"),
    ],
)
def test_the_slowest_part_is_the_bottleneck(changes: dict[str, object], bottleneck: str) -> None:
    found = predict(work(**changes), CARDS["h100"], num_ranks=16)
    assert found.bottleneck == bottleneck
    plain = predict(work(), CARDS["h100"], num_ranks=16)
    assert (found.images_s < plain.images_s) == bool(changes)


def test_gradients_hide_behind_the_backward_pass_and_candidates_do_not() -> None:
    card, plain = CARDS["h100"], predict(work(), CARDS["h100"], num_ranks=16)
    sent = Traffic(0, card.network_byte_s * plain.compute_s / 2)
    hidden = predict(work(sent={"gradients": sent}), card, num_ranks=16)
    assert hidden.step_s == plain.step_s
    assert hidden.step_without_overlap_s == pytest.approx(1.5 * plain.step_s)
    shown = predict(work(sent={CANDIDATES: sent}), card, num_ranks=16)
    assert shown.step_s == pytest.approx(1.5 * plain.step_s)


def test_the_loader_bounds_images() -> None:
    found = predict(work(loader_images_s=10.0), CARDS["b200"], num_ranks=4)
    assert found.images_s == found.loader_images_s == 40.0


# ---- The whole -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(small(), card=CARDS["h100"], nodes=TWO_NODES)


def test_memory_is_the_traced_peak_and_what_is_assumed(plan: Plan) -> None:
    ddp, fsdp = (strategy.memory for strategy in plan.strategies)
    traced = trace(small(), bf16=True, num_shards=16)
    assert ddp.parts == {**traced.ddp_peak, WORKSPACE: 32 * 2**20}
    assert ddp.parts[GRADIENTS] == traced.gradients  # DDP's buckets are there all the time
    assert sum(traced.peak.values()) <= sum(traced.ddp_peak.values())
    assert fsdp.parts[WORKSPACE] == 32 * 2**20
    assert ddp.total == sum(ddp.parts.values()) + sum(ddp.assumed.values())
    for part in (PARAMETERS, AVERAGE, STATES):
        assert fsdp.parts[part] == ddp.parts[part] / 16
    assert ddp.fits
    assert not replace(ddp, limit=ddp.total - 1).fits


def test_a_frozen_encoder_is_sharded_and_has_no_gradient_to_send(plan: Plan) -> None:
    cfg = small()
    cfg = replace(cfg, optim=replace(cfg.optim, freeze_encoder=True))
    found = make_plan(cfg, card=CARDS["h100"], nodes=TWO_NODES)
    ddp, fsdp = found.strategies
    assert found.parameters[FROZEN] == plan.parameters["encoder"] > 0
    assert ddp.memory.parts[FROZEN] == 4 * found.parameters[FROZEN]
    assert fsdp.memory.parts[FROZEN] == ddp.memory.parts[FROZEN] / 16
    sent, before = ddp.sent["gradients"], plan.strategies[0].sent["gradients"]
    share = trained(found.parameters) / trained(plan.parameters)
    assert 0 < share < 1
    assert sent.network / before.network == pytest.approx(share, rel=0.01)


ROW_BYTES = 32 * 128  # of a view's rows on a rank, a byte a feature
OF_CAPTIONS = [("send", 2 * ROW_BYTES, 4 * 15), ("send", 4 * ROW_BYTES, 16)]
OF_VIEWS = [("all_reduce", 2 * 16 * 4 * ROW_BYTES, 2)]
OF_TARGETS = [("send", 4 * ROW_BYTES, 4 * 15)]  # which have no gradient


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip", OF_CAPTIONS),
        ("slip", OF_CAPTIONS + OF_VIEWS),
        ("simclr", OF_VIEWS),
        ("moco_v3", 2 * OF_TARGETS),  # of each view
        ("byol", []),
    ],
)
def test_rows_that_meet_those_of_all_ranks_are_sent(
    name: str, expected: list[tuple[str, int, int]]
) -> None:
    found = make_plan(demo_method(name), card=CARDS["h100"], nodes=TWO_NODES)
    calls = found.strategies[0].collectives.get(CANDIDATES, [])
    assert [(call.call, call.size, call.count) for call in calls] == expected


@pytest.mark.parametrize(
    ("card", "deterministic", "expected"),
    [("a100", False, 8_519_680), ("a100", True, 2**25), ("h200", True, 2**25), ("cpu", True, 0)],
)
def test_the_workspace_of_cublas_is_the_cards(
    card: str, deterministic: bool, expected: int
) -> None:
    """As torch's allocator was seen to give it on the null CUDA runtime."""
    cfg = replace(small(), deterministic=deterministic)
    (alone,) = make_plan(cfg, card=CARDS[card], nodes=Nodes(1, 8)).strategies
    assert alone.memory.parts[WORKSPACE] == expected


def test_a_plan_survives_json(plan: Plan) -> None:
    read = json.loads(json.dumps(plan.to_dict()))
    assert read["global_batch"] == 16 * 8
    assert read["strategies"][0]["memory"]["total"] == plan.strategies[0].memory.total
    assert read["model_flops_per_image"] == plan.work.model / 8
    assert read["flops"]["target encoder"]["backward"] == 0


def test_one_rank_has_no_strategies() -> None:
    found = make_plan(small(), card=CARDS["cpu"], nodes=ONE)
    assert [strategy.name for strategy in found.strategies] == ["alone"]
    assert found.strategies[0].memory.fits is None
    assert not found.bf16
    assert "every rate is assumed" in " ".join(found.assumptions)


def test_sharding_pays_for_a_large_model() -> None:
    """InternImage-G has 3 billion parameters: 16 bytes each and their averages are most of it."""
    cfg = recipes()["m3i_internimage_g"]()
    found = make_plan(cfg, card=CARDS["h100"], nodes=Nodes(64, 8))
    ddp, fsdp = (strategy.memory for strategy in found.strategies)
    assert fsdp.total < ddp.total / 2


def test_published_rates() -> None:
    rates = {name: card.bf16_flop_s for name, card in CARDS.items() if card.is_gpu}
    assert rates == {
        "a100": 312e12,
        "a100_40gb": 312e12,
        "a100_pcie": 312e12,
        "h100": 989e12,
        "h200": 989e12,
        "h100_pcie": 756e12,
        "h100_nvl": 835e12,
        "h200_nvl": 835e12,
        "b200": 2250e12,
    }
    for name, card in CARDS.items():
        a_clock = {"a100": 2048, "b200": 8192}.get(name.split("_")[0], 4096)
        expected = pytest.approx(card.bf16_flop_s, rel=2e-3)
        assert not card.is_gpu or card.multiprocessors * card.clock_hz * a_clock == expected


def test_a_run_in_fp8_is_planned_at_the_rate_of_bf16_and_says_so(plan: Plan) -> None:
    cfg = replace(small(), precision="fp8_current")
    found = make_plan(cfg, card=CARDS["h100"], nodes=TWO_NODES)
    assert found.bf16 and found.strategies == plan.strategies
    assert set(found.assumptions) - set(plan.assumptions) == {
        "products in FP8 run at the rate of bf16: what they gain is not predicted"
    }


def test_a_step_of_several_batches_is_planned_as_one_of_them_and_says_so(plan: Plan) -> None:
    cfg = replace(small(), parallel=replace(small().parallel, accumulate=4))
    found = make_plan(cfg, card=CARDS["h100"], nodes=TWO_NODES)
    for one, several in zip(plan.strategies, found.strategies, strict=True):
        parts = {**one.memory.parts, ADDED_UP: 4 * trained(plan.parameters)}
        assert several == replace(one, memory=replace(one.memory, parts=parts))
    assert found.global_batch == 4 * plan.global_batch
    assert set(found.assumptions) - set(plan.assumptions) == {
        "parallel.accumulate: all is of one of the 4 batches of a step, as if it were a step"
    }


def test_all_local_views_are_one_pass_of_the_encoder_and_of_the_decoder() -> None:
    cfg = recipes()["m3i_vit_b"]()
    local = replace(cfg.data.global_views, size=96, count=3)
    cfg = replace(cfg, data=replace(cfg.data, batch_size=32, local_views=local))
    rows = dict(gemm_shapes(cfg).rows(32))
    assert rows["local views"] == 3 * 32 * 36  # cells of a view of 96 pixels
    assert token_rows(counts_of(cfg))["local views"] == 3 * 32 * 36
    queries = cfg.vision.num_patches
    asked = counts_of(cfg).num_asked("first")
    assert rows["decoder of inter, local views"] == 3 * asked * (36 + queries)


MIXED = ("s3://bucket/photos:train:3", "data/drawings:train:1")


@pytest.mark.parametrize(
    ("mixture", "card", "ranks", "expected", "words"),
    [
        ((), "h100", 8, 25e9, "DGX A100"),
        (("data/a:train:1", "data/b:train:2"), "h100", 8, 25e9, "DGX A100"),
        (("s3://bucket/a:train:1",), "h100", 8, 12.5e9, "100 Gbit/s"),
        (MIXED, "h100", 8, 12.5e9 / 0.75, "75% of the pictures"),
        (("gs://bucket/a:train:1", "data/b:train:9"), "h100", 8, 25e9 / 0.9, "90% of the pictures"),
        (MIXED, "cpu", 2, 2 * 1.25e9 / 0.75, "network adapters"),
    ],
)
def test_what_a_node_reads_is_that_of_all_data_sets(
    mixture: tuple[str, ...], card: str, ranks: int, expected: float, words: str
) -> None:
    cfg = replace(small(), data=replace(small().data, mixture=mixture))
    source = source_of(cfg, CARDS[card], Nodes(ranks, 8))
    assert source.read_byte_s == pytest.approx(expected)
    assert source.read_as.startswith("assumed") and words in source.read_as


def test_a_plan_asks_for_what_a_strategy_that_fits_trains(plan: Plan) -> None:
    def with_limit(one: Strategy, limit: float, step_s: float) -> Strategy:
        memory, speed = replace(one.memory, limit=limit), replace(one.speed, step_s=step_s)
        return replace(one, memory=memory, speed=speed)

    ddp, fsdp = plan.strategies[:2]
    quick, slow = with_limit(ddp, 1.0, 0.1), with_limit(fsdp, math.inf, 0.4)
    found = replace(plan, strategies=[quick, slow])
    assert found.chosen == slow and found.asked_images_s == plan.batch_size / 0.4
    none_fits = replace(plan, strategies=[quick, with_limit(fsdp, 1.0, 0.4)])
    assert none_fits.chosen == quick and none_fits.asked_images_s == plan.batch_size / 0.1


def test_the_strategy_that_is_asked_for_is_told_where_it_fits(plan: Plan) -> None:
    ddp, fsdp = plan.strategies
    quick = replace(fsdp, speed=replace(fsdp.speed, step_s=ddp.speed.step_s / 2))
    assert replace(plan, strategies=[ddp, quick]).chosen == ddp and plan.own == "ddp"
    sharded = replace(small(), parallel=replace(small().parallel, shard=-1))
    assert own_layout(sharded, TWO_NODES) == "fsdp" and own_layout(small(), Nodes(1, 8)) == "alone"
    groups = replace(small(), parallel=replace(small().parallel, shard=8))
    assert own_layout(groups, TWO_NODES) == "hsdp"


def test_what_training_refuses_is_told_by_the_plan() -> None:
    cfg = replace(small(), parallel=replace(small().parallel, shard=3), precision="fp8_block")
    found = refusals_of(cfg, CARDS["a100"], Nodes(8, 8))
    assert found[0].startswith("parallel.shard: expected a divisor of the 8 ranks, got 3")
    assert found[1].startswith("precision: a100 computes bf16, expected one of these, got fp8_blo")
    assert refusals_of(small(), CARDS["h100"], Nodes(8, 8)) == []
    several = replace(recipes()["m3i_vit_b_h100"](), parallel=ParallelConfig(accumulate=4))
    (reason,) = refusals_of(several, CARDS["h100"], Nodes(8, 8))
    assert reason.startswith("parallel.accumulate: expected 1 with the term")
    with pytest.raises(ValueError, match=re.escape(reason)):
        expect_additive(several, nn.Linear(1, 1))
    eight = replace(recipes()["m3i_vit_b_h100"](), precision="fp8_block")
    uneven = replace(eight, data=replace(eight.data, batch_size=98))
    assert any("data.batch_size: not legal for fp8_block" in why for why in refusals_of(
        uneven, CARDS["h100"], Nodes(8, 8)))  # fmt: skip


def test_groups_of_ranks_that_cross_nodes_send_over_the_network() -> None:
    assert Nodes(12, 8).count == 2 and Nodes(16, 8).count == 2 and Nodes(4, 8).count == 1


@pytest.mark.matrix
def test_the_loader_of_a_vit_s_is_that_of_the_page() -> None:
    """docs/start/data_at_scale.md, whose commands these are."""
    text = (ROOT / "docs" / "start" / "data_at_scale.md").read_text()
    table = text.split("| pictures/s of a card |")[1].split("\n\n")[0].splitlines()[2:]
    said = {row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]] for row in table}
    columns: dict[str, list[str]] = {name: [] for name in said}
    cfg = recipes()["m3i_vit_s_h100"]()
    for picture, kilobytes in (((375, 500), None), ((768, 1024), None), ((256, 341), 27.0)):
        source = source_of(cfg, CARDS["h100"], NODE, picture=picture, kilobytes=kilobytes)
        plan = make_plan(cfg, card=CARDS["h100"], nodes=NODE, source=source)
        loader, asked = plan.loader, plan.asked_images_s
        rates = [loader.rates[part] for part in (READING, ENGINES, THREADS, VIEWS)]
        cells = [f"{rate:,.0f}" for rate in (*rates, asked)]
        cells += [plan.strategies[0].speed.bottleneck, f"{asked * loader.thread_s:.1f}"]
        cells.append(f"{8 * asked * loader.picture_bytes / 1e9:.1f} GB/s")
        for name, cell in zip(columns, cells, strict=True):
            columns[name].append(cell)
        if kilobytes is None and picture == PICTURE:
            _expect_on_the_page_of_packing(8 * asked, loader.decode_s)
    assert columns == said


def _expect_on_the_page_of_packing(asked: float, decode_s: float) -> None:
    text = " ".join((ROOT / "docs" / "start" / "pack.md").read_text().split())
    assert f"predicts {asked:,.0f} images/s" in text
    product = f"{asked:,.0f} x {1e3 * decode_s:g} ms = {asked * decode_s:.0f} threads"
    assert product in text


def test_a_graph_of_the_step_keeps_what_the_step_allocates() -> None:
    """Beside the memory of the steps that have no graph; of the batch it has a copy."""
    cfg = replace(recipes()["m3i_vit_s"](), log_every=2)
    parts = {
        graphs: make_plan(replace(cfg, cuda_graphs=graphs), card=CARDS["h100"], nodes=Nodes(1, 1))
        .strategies[0]
        .memory.parts
        for graphs in ("none", "step")
    }
    plain, graphed = parts["none"], dict(parts["step"])
    kept = graphed.pop(GRAPHS)
    assert graphed == plain
    held = sum(size for part, size in plain.items() if part in HELD)
    of_the_step = sum(plain.values()) - held - plain[WORKSPACE]
    assert kept == pytest.approx(of_the_step + plain[BATCH] + 2 * plain[WORKSPACE], rel=1e-6)
    assert of_the_step > plain[PARAMETERS]
