"""The compile half of a sweep: NVRTC's code, its resources, and what is dropped and why."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.progress import Progress

from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.tune import build as tune_build
from m3i_fast.benchmarks.tune import main as tune
from m3i_fast.benchmarks.tune import timing as tune_time
from m3i_fast.benchmarks.tune.candidates import (
    SUBJECTS,
    Subject,
    candidates,
    compile_candidate,
    predict,
    with_policy,
)
from m3i_fast.benchmarks.tune.compile import code_digest, compile_cubin
from m3i_fast.benchmarks.tune.tile_roofline import GPUS, boltzmann_ms, occupancy
from m3i_fast.costs.kernels.boltzmann import MANY_PATCHES, PATCHES, Tiles, tiles_of
from m3i_fast.costs.kernels.constants import Rates
from m3i_fast.doctor.probes import fatbin_architectures
from m3i_fast.ops import dcnv3, tiles
from tests.shared.cuda.emulator import emulated
from tests.shared.cuda.nvcc import CUDA, find_nvcc
from tests.shared.ops.dcnv3_cases import Config, assert_right, make

pytest.importorskip("cupy")


def subject(op: str, card: str, kind: str) -> Subject:
    (found,) = (s for s in SUBJECTS if (s.op, s.card, s.kind) == (op, card, kind))
    return found


# ---- Code ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("card", "architecture"), [("a100", "sm_80"), ("h100", "sm_90a")])
def test_resources_are_those_that_nvcc_gives(card: str, architecture: str) -> None:
    """budget.json has nvcc's, rounded up to the eights in which registers are given out."""
    of_call = subject("dcnv3", card, "small")
    compiled = compile_candidate(of_call, tiles.read("dcnv3"))
    budget = json.loads((CUDA / "dcnv3" / "budget.json").read_text())[architecture]
    assert len(compiled.kernels) == 3
    for name, used in compiled.kernels.items():
        allowed = budget[name.replace("m3i::dcnv3::", "").replace("m3i::", "")]
        assert allowed["registers"] - 8 < used.registers <= allowed["registers"]
        assert used.spill_bytes == allowed["spill_bytes"] == 0


def test_a_candidates_tiles_take_the_place_of_those_of_the_sources() -> None:
    """64 x 64 by 2 x 4 warps: 256 threads, and shared memory as counted by hand."""
    of_call = subject("boltzmann", "a100", "half")
    tile = {"side": 64, "stages": 4, "warps_down": 2, "warps_across": 4}
    table = with_policy(tiles.read("boltzmann"), of_call, tile)
    compiled = compile_candidate(of_call, table)
    operand = max(64 * (32 + 8), 32 * (64 + 8)) * 2
    vectors = 64 * 4 * (1 + (1 + 3 + 4)) + 64 * 4 * (1 + (3 + 3 + 2))
    assert compiled.constants == (4 * 2 * operand + vectors, 256)


def test_what_the_model_fixes_is_what_the_sources_fix() -> None:
    tiles, warpgroups = tiles_of("h100"), 2
    names = ("kHopperTile.rows", "kHopperTile.columns", "kHopperTile.depth", "kClusterBlocks")
    names += ("kConsumers", "kHalfRows", "kWarpgroupThreads")
    source = '#include "boltzmann/sm90/tiling.h"\nusing namespace m3i::boltzmann;'
    more = ("kPatches", "kManyPatches", "grads_elements(m3i::DType::kBFloat16, 90)")
    compiled = compile_cubin(source, [], "sm_90a", constants=[*names, *more])
    assert compiled.constants == (
        *(tiles.rows * tiles.multicast, tiles.columns, tiles.depth, tiles.multicast),
        *(warpgroups, tiles.half_rows, 32 * tiles.num_warps // warpgroups),
        *(PATCHES, MANY_PATCHES, tiles.grads_bytes // tiles.size),
    )


def test_an_illegal_policy_fails_to_compile_by_the_files_name() -> None:
    table = tiles.read("dcnv3")
    table["h100"]["large"]["chunk"] = 129  # of 128 threads
    headers = {"dcnv3/tiles.h": tiles.render("dcnv3", table)}
    with pytest.raises(RuntimeError, match=r"cuda/dcnv3/tiles\.json: threads, slots or chunks"):
        compile_cubin('#include "dcnv3/tiling.h"', [], "sm_80", headers=headers)


def test_equal_instructions_are_told_from_others() -> None:
    """Bounds that ptxas does not need change the name of a kernel and not its code."""
    source = """template <int kBlocks, int kFactor>
    __global__ void __launch_bounds__(128, kBlocks) scale_kernel(float* values) {
      values[threadIdx.x] *= kFactor;
    }"""
    digests = {
        names: code_digest(compile_cubin(source, [f"scale_kernel<{names}>"], "sm_80").cubin)
        for names in ("1, 2", "4, 2", "4, 3")
    }
    assert digests["1, 2"] == digests["4, 2"] != digests["4, 3"]


# ---- Occupancy -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "threads", "registers", "shared", "blocks"),
    [
        ("a100", 128, 80, 0, 6),  # registers: 10,240 of 65,536 a block
        ("a100", 256, 33, 0, 6),  # a warp's 33 * 32 are rounded up to 1280
        ("a100", 1024, 32, 0, 2),  # threads: 2048
        ("a100", 32, 16, 0, 32),  # blocks
        ("a100", 128, 32, 54 * 1024, 2),  # with its KiB of the driver three take 165
        ("h100", 128, 32, 54 * 1024, 4),
        ("a100", 128, 32, 164 * 1024, 0),
        ("h100", 384, 168, 217 * 1024, 1),
        ("h100", 1024, 72, 0, 0),  # registers of one block
    ],
)
def test_occupancy(card: str, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert occupancy(GPUS[card], threads, registers, shared) == blocks


def test_a_call_on_a_card_of_ones_takes_what_is_counted_by_hand() -> None:
    """Two multiprocessors, a clock of 1 GHz, and rates so high that one bound is left."""
    fast = 1e30
    rates = Rates(
        card="a100",
        multiprocessors=2,
        clock_hz=1e9,
        memory_byte_s=fast,
        l2_byte_s=fast,
        atomic_sector_s=fast,
        wavefront_s=fast,
        issue_s=fast,
        exponential_s=fast,
        tensor_flop_s=4e9,  # 2 flop a clock and multiprocessor
        l1_bytes=fast,
        launch_s=0,
    )
    tile = Tiles(
        rows=64, columns=64, depth=32, warps=(2, 2), half_rows=64, multicast=1, at_once=2,
        grads_bytes=24 << 20,
    )  # fmt: skip
    # Sums, G, and both products with it: 4, 4 and 4 tiles of 64 x 64, of 64, 64 and 128 terms.
    clocks = (2 + 2 + 4) * 64 * 64 * 64
    stages = 1 << 30  # no step waits
    assert boltzmann_ms(rates, tile, stages, 128, 128, 64) == pytest.approx(clocks / 1e6)
    wide = replace(tile, depth=16, size=4)
    assert boltzmann_ms(rates, wide, stages, 128, 128, 64) == pytest.approx(6 * clocks / 1e6)
    # Latency alone: steps of 32 terms, two of them on their way, of both tiles at once.
    slow = replace(rates, tensor_flop_s=fast)
    clocks = (2 + 2 + 4) * 300
    assert boltzmann_ms(slow, tile, 3, 128, 128, 64) == pytest.approx(clocks / 1e6)


# ---- What is dropped -----------------------------------------------------------------------------


def compiled_half(of_call: Subject, policy: dict[str, int]) -> tune.Candidate:
    candidate = tune.Candidate(policy, current=False)
    tune.compile_half(of_call, tiles.read(of_call.op), candidate)
    return candidate


def test_spills_are_dropped() -> None:
    """Four blocks of 512 threads leave 32 registers a thread."""
    policy = {"warps": 16, "blocks": 4, "bwd_blocks": 4, "slots": 288, "chunk": 64}
    candidate = compiled_half(subject("dcnv3", "a100", "large"), policy)
    assert candidate.resources["registers"] <= 32
    current = known(1, "another", 1.0, current=True)
    tune.prune([current, candidate])
    assert candidate.dropped == f"spills {candidate.resources['spill_bytes']} bytes"
    assert current.dropped is None


def test_as_much_as_the_current_policy_spills_is_allowed() -> None:
    found = [known(1, "a", 1.0, current=True), known(2, "b", 1.0), known(3, "c", 1.0)]
    for candidate, spilled in zip(found, (16, 16, 20), strict=True):
        candidate.resources["spill_bytes"] = spilled
    tune.prune(found)
    assert [candidate.dropped for candidate in found] == [None, None, "spills 20 bytes"]


def test_what_does_not_fit_is_dropped() -> None:
    policy = {"side": 128, "stages": 8, "warps_down": 2, "warps_across": 2}
    candidate = compiled_half(subject("boltzmann", "a100", "half"), policy)
    assert candidate.resources["shared_bytes"] > 163 * 1024
    assert candidate.dropped == "occupancy 0: no block fits a multiprocessor"
    assert candidate.predicted_ms is None


def test_what_cannot_be_built_is_not_compiled() -> None:
    policy = {"warps": 1, "blocks": 6, "bwd_blocks": 5, "slots": 288, "chunk": 64}
    candidate = compiled_half(subject("dcnv3", "a100", "large"), policy)
    assert candidate.dropped == (
        "cannot be built: chunk: expected at most the block's 32 threads, got 64"
    )
    assert not candidate.resources


def known(name: int, code: str, ms: float, *, current: bool = False) -> tune.Candidate:
    candidate = tune.Candidate({"warps": name}, current)
    candidate.code, candidate.predicted_ms = (code,), ms
    return candidate


def test_twins_and_slow_ones_are_dropped_and_the_current_one_stays() -> None:
    found = [
        known(1, "a", 9.0, current=True),
        known(2, "b", 1.0),
        known(3, "b", 1.0),
        known(4, "c", 1.2),
        known(5, "d", 1.3),
    ]
    tune.prune(found)
    dropped = [candidate.dropped for candidate in found]
    assert dropped[:2] == [None, None] and dropped[3] is None
    assert dropped[2] == "the same code as warps 2"
    assert dropped[4] == "dominated: 1.30 times the model's best"


def test_fewer_slots_mean_more_chunks_and_a_longer_prediction() -> None:
    of_call = subject("dcnv3", "h100", "small")
    table = tiles.read("dcnv3")
    few = with_policy(table, of_call, {**table["h100"]["small"], "slots": 96})
    predictions = [
        predict(of_call, of_table, compile_candidate(of_call, of_table))
        for of_table in (table, few)
    ]
    assert all(prediction.ms for prediction in predictions)
    assert predictions[0].ms < predictions[1].ms
    assert predictions[0].shared_bytes > predictions[1].shared_bytes


# ---- The whole -----------------------------------------------------------------------------------


@pytest.mark.parametrize("of_call", SUBJECTS, ids=str)
def test_the_current_policy_is_a_candidate_once_and_all_can_be_built(of_call: Subject) -> None:
    current = tiles.read(of_call.op)[of_call.card][of_call.kind]
    found = candidates(of_call, current)
    assert found[0] == current and len({repr(sorted(p.items())) for p in found}) == len(found) > 1
    for policy in found:
        assert policy.keys() == current.keys()
        assert tiles.problem_of(policy) is None


def test_a_sweep_without_the_card_compiles_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    monkeypatch.setattr(tune, "card_here", lambda: None)
    tune.main(["--card", "h100", "--op", "dcnv3", "--kind", "large", "--most", "3"])
    rows = [row["figures"] for row in ledger.read_rows("tune")]
    assert [row["current"] for row in rows] == [True, False, False]
    for row in rows:
        assert (row["op"], row["card"], row["kind"]) == ("dcnv3", "h100", "large")
        assert row["registers"] > 0 and row["blocks_per_multiprocessor"] > 0
        assert row["predicted_ms"] > 0 and row["measured_ms"] is None and not row["chosen"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "dcnv3 h100.large" in shown and "3 rows appended to" in shown


@pytest.mark.parametrize("op", ["dcnv3", "boltzmann"])
def test_the_check_takes_the_kernels_and_no_others(op: str) -> None:
    """The calls that are timed on a GPU, here emulated."""
    of_call = subject(op, "a100", {"dcnv3": "large", "boltzmann": "half"}[op])
    with emulated(op):
        assert tune_time.check(of_call, torch.ops.m3i, "cpu") is None


# Warps of a block, by the card and class of calls whose policy it is.
WARPS = {("a100", "small"): 1, ("a100", "large"): 2, ("h100", "small"): 4, ("h100", "large"): 8}


@pytest.fixture
def four_policies(tmp_path: Path) -> Path:
    """dcnv3 in float32 with four policies; the one of `offset_scale` warps refuses its calls."""
    folder = tmp_path / "dcnv3"
    shutil.copytree(CUDA / "dcnv3", folder)
    table = tiles.read("dcnv3")
    for (card, kind), warps in WARPS.items():
        blocks = {"blocks": 2, "bwd_blocks": 2}
        table[card][kind] |= {"warps": warps, "chunk": 8, **blocks}
    (folder / "tiles.h").write_text(tiles.render("dcnv3", table))
    launcher = folder / "sm80/launch.cu"
    text = launcher.read_text().replace("dispatch_dtype<float, BFloat16, Float16, double>",
                                        "dispatch_dtype<float>")  # fmt: skip
    tiling = "const Tiling tiling = make_tiling(shape, kVector, kPolicy);"
    refusal = "if (shape.offset_scale == kPolicy.warps) return cudaErrorInvalidValue;"
    assert text.count(tiling) == 2
    launcher.write_text(text.replace(tiling, f"{refusal}\n{tiling}"))
    return tmp_path


@pytest.mark.parametrize(("card", "architecture"), [("a100", 80), ("h100", 90)])
def test_launchers_choose_by_card_and_size(
    card: str, architecture: int, four_policies: Path
) -> None:
    """Results are right with every policy, 9 points in chunks of 8 among them."""
    with emulated("dcnv3", folder=four_policies, architecture=architecture):
        for kind, image in (("small", (19, 21)), ("large", (20, 20))):
            config = Config(batch=1, image=image, groups=2, group_size=8, offset_scale=0.5)
            assert_right(dcnv3, config, torch.float32)
            inputs, _ = make(config)
            for scale in WARPS.values():
                arguments = replace(config, offset_scale=float(scale)).arguments
                if scale == WARPS[card, kind]:
                    with pytest.raises(RuntimeError, match="invalid argument"):
                        torch.ops.m3i.dcnv3(*inputs, *arguments)
                else:
                    torch.ops.m3i.dcnv3(*inputs, *arguments)


@pytest.mark.parametrize(("card", "code"), [("a100", "sm_80"), ("h100", "sm_90a")])
def test_nvcc_builds_a_candidate_as_operators_of_its_own(
    card: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the timing half builds it on a card; a torch without CUDA cannot load it."""
    find_nvcc()
    monkeypatch.setattr(tune_build, "build_folder", lambda: tmp_path)
    library = tune_build.build_ops("dcnv3", tiles.read("dcnv3"), card)
    assert fatbin_architectures(library) == [code]
    text = library.read_bytes()
    assert library.stem.encode() + b"\0" in text and b"\0m3i\0" not in text


@pytest.mark.gpu
def test_candidates_are_timed_on_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = tune.card_here()
    if card is None:
        pytest.skip("tiles have no class for this card: neither an A100 nor an H100")
    (of_call,) = (s for s in SUBJECTS if (s.op, s.card, s.kind) == ("dcnv3", card, "small"))
    monkeypatch.setattr(tune_build, "build_folder", lambda: tmp_path)
    cfg = tune.Config(most=2, num_samples=3, record=False)
    with Progress() as bar:
        found = tune.sweep(cfg, of_call, timed=True, bar=bar)
    timed = [candidate for candidate in found if candidate.dropped is None]
    assert all(candidate.timing and candidate.timing.median_ms > 0 for candidate in timed)
    assert sum(candidate.chosen for candidate in timed) == 1
