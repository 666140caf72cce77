"""What a sweep tries: for each card and class of calls the tiles, and their code."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

from m3i_fast.benchmarks.tune.compile import ARCHITECTURES, Compiled, compile_cubin
from m3i_fast.benchmarks.tune.tile_roofline import GPUS, boltzmann_ms, dcnv3_ms, occupancy
from m3i_fast.costs.kernels.boltzmann import tiles_of
from m3i_fast.costs.kernels.dcnv3 import Layout
from m3i_fast.costs.kernels.gather import Sampling
from m3i_fast.ops.tiles import CUDA, Policy, Table, render


@dataclass(frozen=True, slots=True)
class Subject:
    """An entry of tiles.json, and the call that stands for its class."""

    op: str  # its folder in cuda/
    card: str
    kind: str
    dtype: str
    shape: tuple[int, ...]  # dcnv3: N, H, W, C, groups; boltzmann: N, M, D

    def __str__(self) -> str:
        return f"{self.op} {self.card}.{self.kind} {'x'.join(map(str, self.shape))} {self.dtype}"


_MAPS = {"small": (64, 14, 14, 512, 32), "large": (64, 56, 56, 128, 8)}
SUBJECTS = (
    *(
        Subject("dcnv3", card, kind, "bfloat16", shape)
        for card in ("a100", "h100")
        for kind, shape in _MAPS.items()
    ),
    *(
        Subject("boltzmann", card, kind, dtype, shape)
        for card in ("a100", "h100")
        for kind, dtype, shape in (
            ("half", "bfloat16", (32768, 32768, 512)),
            ("float", "float32", (8192, 8192, 512)),
            ("blocks", "bfloat16", (32768, 32768, 512)),
        )
    ),
    Subject("dcnv3", "cpu", "any", "float32", (4, 28, 28, 128, 8)),
    Subject("boltzmann", "cpu", "any", "float32", (4096, 4096, 512)),
)
POINTS = 9  # of a 3 x 3 kernel
REACH = 3**0.5  # pixels; offsets are of a normal distribution of deviation 1


# ---- Tiles ---------------------------------------------------------------------------------------


def _grid(**values: tuple[int, ...]) -> Iterator[Policy]:
    for choice in itertools.product(*values.values()):
        yield dict(zip(values, choice, strict=True))


def _dcnv3_grid() -> Iterator[Policy]:
    """By threads that a multiprocessor has at least, from which blocks follow."""
    for warps, threads, bwd_threads, slots in itertools.product(
        (2, 4, 8), (512, 768, 1024), (512, 640, 768), (96, 288)
    ):
        yield {
            "warps": warps,
            "blocks": threads // (32 * warps),
            "bwd_blocks": bwd_threads // (32 * warps),
            "slots": slots,
            "chunk": 64,
        }


def candidates(subject: Subject, current: Policy) -> list[Policy]:
    """Return the policies of the subject's class, the current one first."""
    if subject.card == "cpu":
        grid = (
            _grid(block_points=(64, 128, 256, 512, 1024))
            if subject.op == "dcnv3"
            else _grid(tile_columns=(384, 768, 1536), run_rows=(64, 128, 256), least_runs=(8,))
        )
    elif subject.op == "dcnv3":
        grid = _dcnv3_grid()
    elif subject.kind == "blocks":
        grid = _grid(grads_mib=(12, 16, 24, 32, 40))
    elif "producer_registers" in current:
        pairs = ((24, 240), (40, 232))
        grid = (
            {"stages": stages, "producer_registers": producer, "consumer_registers": consumer}
            for stages in (2, 3, 4)
            for producer, consumer in pairs
        )
    else:
        grid = (
            {"side": side, "stages": stages, "warps_down": down, "warps_across": across}
            for side in (64, 128)
            for stages in (2, 3, 4, 5)
            for down, across in ((2, 2), (2, 4), (4, 2))
        )
    distinct = [current]
    for policy in grid:  # blocks of different bounds may be rounded to the same
        if policy not in distinct:
            distinct.append(policy)
    return distinct


def with_policy(table: Table, subject: Subject, policy: Policy) -> Table:
    """Return the table with a candidate in its place, and wherever its kernel is shared."""
    changed = deepcopy(table)
    changed[subject.card][subject.kind] = dict(policy)
    if (subject.op, subject.kind) == ("boltzmann", "float"):
        for card in ("a100", "h100"):
            changed[card]["float"] = dict(policy)
    return changed


# ---- Code ----------------------------------------------------------------------------------------

_ELEMENTS = {"bfloat16": "m3i::BFloat16", "float32": "float"}


def compile_candidate(subject: Subject, table: Table) -> Compiled:
    """Compile the subject's kernels, forward and backward of its dtype, with the table's tiles."""
    op, element = subject.op, _ELEMENTS[subject.dtype]
    headers = {f"{op}/tiles.h": render(op, table)}
    (kernels_file,) = (CUDA / op).rglob("kernels.cuh")
    source = f'#include "{kernels_file.relative_to(CUDA).as_posix()}"\n'
    source += f"using namespace m3i;\nusing namespace m3i::{op};\n"
    if op == "dcnv3":
        policy = table[subject.card][subject.kind]
        source += _dcnv3_constants(subject.shape, policy)
        threads, group_size = 32 * policy["warps"], subject.shape[3] // subject.shape[4]
        kernels = [
            f"m3i::dcnv3::dcnv3_nine_kernel<{element}, {group_size}, {threads}, "
            f"{policy['blocks']}>",
            f"m3i::dcnv3::dcnv3_bwd_kernel<{element}, 8, {threads}, {policy['bwd_blocks']}, true>",
            f"m3i::dcnv3::dcnv3_bwd_window_kernel<{element}, 8, {threads}, {policy['bwd_blocks']}>",
        ]
        layout = f"m3i::dcnv3::NineLayout<{element}, {group_size}>"
        constants = [f"kWarps * {layout}::kWarpBytes"]
        constants.append("m3i::dcnv3::block_bytes<float>(kTiling, kWarps, true)")
        constants.append("m3i::dcnv3::window_block_bytes(kTiling, kWarps)")
        constants += ["m3i::dcnv3::kMostShared", "kTiling.chunk"]
    else:
        stems = [
            f"sums_kernel<{element}, m3i::boltzmann::SumsMode::kShared>",
            f"logit_grads_kernel<{element}, false>",
            f"feature_grads_kernel<{element}>",
        ]
        hopper = _is_hopper(subject)
        if hopper:
            stems = [f"sums_hopper_kernel<{element}>", f"grads_hopper_kernel<{element}, false>"]
        kernels = [f"m3i::boltzmann::boltzmann_{stem}" for stem in stems]
        name = "HopperShared" if hopper else f"Shared<{element}>"
        constants = [f"sizeof(m3i::boltzmann::{name})"]
        constants.append("m3i::boltzmann::kHopperThreads" if hopper
                         else f"m3i::boltzmann::Shape<{element}>::kThreads")  # fmt: skip
    return compile_cubin(
        source, kernels, ARCHITECTURES[subject.card], headers=headers, constants=constants
    )


def _is_hopper(subject: Subject) -> bool:
    return (subject.op, subject.card, subject.dtype) == ("boltzmann", "h100", "bfloat16")


def _dcnv3_constants(shape: tuple[int, ...], policy: Policy) -> str:
    _, height, width, channels, groups = shape
    values = ", ".join(map(str, policy.values()))
    return f"""
__device__ constexpr Dcnv3Shape make_shape() {{
  Dcnv3Shape shape{{}};
  shape.out_height = {height};
  shape.out_width = {width};
  shape.groups = {groups};
  shape.group_size = {channels // groups};
  shape.points = {POINTS};
  return shape;
}}
constexpr Policy kPolicy{{{values}}};
constexpr int kWarps = kPolicy.warps;
__device__ constexpr Tiling kTiling = make_tiling(make_shape(), 8, kPolicy);
"""


# ---- Predictions ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prediction:
    blocks: int
    """On a multiprocessor at once, the fewest of all kernels; 0: one does not fit."""
    ms: float | None
    """Forward and backward."""
    shared_bytes: int
    """Dynamic, the most of all kernels."""


def predict(subject: Subject, table: Table, compiled: Compiled) -> Prediction:
    gpu = GPUS[subject.card]
    registers = [used.registers for used in compiled.kernels.values()]
    policy = table[subject.card][subject.kind]
    if subject.op == "dcnv3":
        forward_bytes, backward_bytes, window_bytes, most_bytes, chunk = compiled.constants
        has_windows = window_bytes <= most_bytes  # else the launcher takes the kernel without
        if has_windows:
            backward_bytes = window_bytes
        threads = 32 * policy["warps"]
        fits = [
            occupancy(gpu, threads, registers[0], forward_bytes),
            occupancy(gpu, threads, registers[2 if has_windows else 1], backward_bytes),
        ]
        if not min(fits):
            return Prediction(0, None, backward_bytes)
        batch, height, width, channels, groups = subject.shape
        sampling = Sampling(
            batch=batch, height=height, width=width, channels=channels, groups=groups, size=2,
            reach=REACH,
        )  # fmt: skip
        layout = Layout(sampling=sampling, warps_of_block=policy["warps"])
        ms = sum(
            dcnv3_ms(layout, gpu.rates, fit, chunk, backward=backward)
            for fit, backward in zip(fits, (False, True), strict=True)
        )
        return Prediction(min(fits), ms, backward_bytes)
    shared, threads = compiled.constants
    blocks = min(occupancy(gpu, threads, count, shared) for count in registers)
    if not blocks:
        return Prediction(0, None, shared)
    kind = "half" if subject.dtype == "bfloat16" else "float"
    tiles = tiles_of(subject.card, table, wide=kind == "float")
    if not _is_hopper(subject):
        tiles = replace(tiles, at_once=blocks)
    stages = table[subject.card][kind]["stages"]
    ms = boltzmann_ms(gpu.rates, tiles, stages, *subject.shape)
    return Prediction(blocks, ms, shared)
