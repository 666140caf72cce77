"""Steps on the null device whose kernels of ours the emulator computes, from the very sources.

Every operator of ours goes the way it goes on a GPU: `_C_cuda`'s host code asks the null runtime
for its launches. Then its result is computed by the emulator's build of the same operator for the
same card, and held to the CPU's kernel (`emulated_run`). What is held here: the emulator was asked
for the same launches, and training goes on as on the CPU.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from m3i_fast.benchmarks.launches.trace import StepTrace, read_trace, split_at_marks
from m3i_fast.op_registry import OPS
from scripts.null_cuda import environment, program

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ROOT / "build" / "null"

Launch = tuple[str, tuple[int, ...], tuple[int, ...], int, int]

# The operators of a step, by the op that they belong to.
OPERATORS = {
    "add_layer_norm": {"add_layer_norm", "add_layer_norm_bwd"},
    "boltzmann": {
        *("boltzmann_maxima", "boltzmann_sums", "boltzmann_grads", "boltzmann_rows_pass"),
        *("boltzmann_prepare", "boltzmann_shift", "boltzmann_exact", "boltzmann_exact_shift"),
        *("boltzmann_totals", "boltzmann_loss", "boltzmann_sigmoid_loss", "boltzmann_scale"),
    },
    "dcnv3": {"dcnv3", "dcnv3_bwd"},
    "gaussian": {"gaussian", "gaussian_bwd"},
    "mask_mix": {"mask_mix"},
}
DEMO = ("add_layer_norm", "boltzmann", "gaussian", "mask_mix")
INTERNIMAGE = (*DEMO, "dcnv3")
TERMS = ("intra", "inter", "category", "caption")

# AdamW, since on a GPU Muon's iterations are in bf16; with an epsilon that is larger than what
# roundings of the smallest gradients differ by, which it would divide by as little.
ADAMW = ("--optim.matrices", "adamw", "--optim.eps", "1e-6")
FP32 = ("--precision", "fp32", *ADAMW)
# A first step of AdamW follows signs, and those of small gradients differ in bf16: small steps.
BF16 = ("--precision", "bf16", *ADAMW, "--optim.lr", "1e-4")
CLOSE = 5e-6  # relative, of losses, and absolute, of weights
CLOSE_IN_BF16 = 2**-8  # relative, of losses: half a unit in the last place
# Convolutions in bf16 are other algorithms by way of CUDA: their rounding shows in the first step.
CLOSE_WITH_CONVOLUTIONS = 2**-6

# Kernels of a step of the demo; those of logits and gradients differ by card and precision.
ALWAYS = {
    "mask_mix_kernel",
    *(f"add_layer_norm_{name}kernel" for name in ("", "bwd_", "affine_")),
    *(f"gaussian_{name}kernel" for name in ("", "product_", "value_", "bwd_")),
    *(f"boltzmann_{name}_kernel" for name in ("sums", "maxima", "reduce", "total", "rows")),
    *(f"boltzmann_{name}_kernel" for name in ("insert", "prepare", "shift", "exact")),
    *(f"boltzmann_{name}_kernel" for name in ("exact_shift", "totals", "loss", "scale")),
}
SIGMOID = {"boltzmann_sigmoid_loss_kernel"}  # of no step of the demo
BY_MMA = {f"boltzmann_{name}_kernel" for name in ("logit_grads", "feature_grads")}
BY_WARPGROUPS = {f"boltzmann_{name}_hopper_kernel" for name in ("sums", "grads")}
DCNV3 = {"dcnv3_nine_kernel"}
OTHER_CALLS = {"dcnv3_kernel"}  # of no model's layer: not nine points, or other groups
WINDOWED = {"dcnv3_bwd_window_kernel"}  # all gradients; those by offset and mask alone have none
ROUNDED = {"dcnv3_round_kernel"}  # in bf16 gradients are summed in float32
VIEWS = {"views_kernel", "views_patches_kernel"}  # of the loader, not of a step
DETERMINISTIC = {f"dcnv3_{name}_kernel" for name in ("largest", "scatter", "sums", "bwd")}


def launch_of(record: dict[str, Any]) -> Launch:
    """Return what a launch asks for: kernel, grid, block, dynamic shared bytes, cluster."""
    grid, block = tuple(record["grid"]), tuple(record["block"])
    return record["name"], grid, block, record["shared"], record.get("cluster", 1)


@dataclass(frozen=True)
class Trained:
    """What both runs left."""

    folder: Path
    losses: dict[str, list[dict[str, float]]]  # by device
    operators: dict[str, dict[str, float]]

    def asked_of_cuda(self) -> list[Launch]:
        """Return the launches of our kernels that the null runtime was asked for, in order."""
        records = read_trace(self.folder / "trace.jsonl")
        return [launch_of(r) for r in records if r["kind"] == "launch" and "m3i::" in r["name"]]

    def emulated(self) -> list[Launch]:
        """Return the launches that the emulator was asked for, in order."""
        lines = (self.folder / "emulated.jsonl").read_text().splitlines()
        return [launch_of(json.loads(line)) for line in lines]

    def weights(self, device: str) -> dict[str, torch.Tensor]:
        """Return the objective's weights and buffers after the last step."""
        loaded: dict[str, torch.Tensor] = torch.load(self.folder / f"{device}.pt")
        return loaded


def run(
    folder: Path, recipe: str, ops: tuple[str, ...], *flags: str, card: str = "h100"
) -> subprocess.CompletedProcess[str]:
    """Train on the CPU and on the null device; return the process."""
    variables = environment(LIBRARIES, trace=folder / "trace.jsonl", root=ROOT, card=card)
    command = program("-m", "tests.null_cuda.emulated_run", folder, recipe)
    return subprocess.run(
        [*command, ",".join(ops), *flags],
        env=variables, capture_output=True, text=True, timeout=900, cwd=ROOT,
    )  # fmt: skip


def train(
    folder: Path, recipe: str, ops: tuple[str, ...], *flags: str, card: str = "h100"
) -> Trained:
    """Train, and hold that operators of each op were computed, and launches those of CUDA."""
    done = run(folder, recipe, ops, *flags, card=card)
    assert done.returncode == 0, done.stderr[-3000:]
    trained = Trained(folder, **json.loads(done.stdout.splitlines()[-1]))
    computed = {name for name, found in trained.operators.items() if found["calls"] > 0}
    assert {op for op in ops if OPERATORS[op] & computed} == set(ops)
    asked, emulated = trained.asked_of_cuda(), trained.emulated()
    assert len(asked) == len(emulated) > 0
    for number, pair in enumerate(zip(asked, emulated, strict=True)):
        assert pair[0] == pair[1], f"launch {number}: expected as asked of CUDA"
    return trained


def expect_losses(trained: Trained, tolerance: float) -> None:
    """Hold every loss of every step to the CPU's."""
    steps = list(zip(trained.losses["cpu"], trained.losses["cuda"], strict=True))
    for on_cpu, on_cuda in steps:
        names = [name for name in on_cpu if name.startswith("loss/")]
        assert len(names) >= 2
        assert {name: on_cuda[name] for name in names} == pytest.approx(
            {name: on_cpu[name] for name in names}, rel=tolerance
        ), f"step {on_cpu['step']}"


def expect_weights(trained: Trained, tolerance: float) -> None:
    """Hold all weights and buffers after the last step to the CPU's, each number."""
    on_cpu, on_cuda = trained.weights("cpu"), trained.weights("cuda")
    assert on_cpu.keys() == on_cuda.keys()
    errors = {
        name: (on_cuda[name].double() - value.double()).abs().max().item()
        for name, value in on_cpu.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, f"{worst}: expected within {tolerance}, got {errors[worst]}"


def kernels_of(trained: Trained) -> set[str]:
    """Return the names of the kernels that were launched and emulated."""
    names = (launch[0].split("<")[0].split("(")[0] for launch in trained.emulated())
    return {name.rsplit("::", 1)[-1] for name in names}


def test_three_steps_in_float32_are_those_of_the_cpu(tmp_path: Path) -> None:
    trained = train(tmp_path, "demo", DEMO, *FP32, "--num-steps", "3")
    assert len(trained.losses["cuda"]) == 3
    assert {f"loss/{term}" for term in TERMS} < trained.losses["cuda"][0].keys()
    assert kernels_of(trained) == ALWAYS | BY_MMA
    expect_losses(trained, CLOSE)
    expect_weights(trained, CLOSE)


def test_steps_in_bf16_run_the_kernels_of_hopper(tmp_path: Path) -> None:
    trained = train(tmp_path, "demo", DEMO, *BF16, "--num-steps", "2")
    assert kernels_of(trained) == ALWAYS | BY_WARPGROUPS
    clustered = {launch[0] for launch in trained.emulated() if launch[-1] == 2}
    assert len(clustered) == len(BY_WARPGROUPS)
    expect_losses(trained, CLOSE_IN_BF16)


def test_deterministic_steps_of_an_internimage_are_those_of_the_cpu(tmp_path: Path) -> None:
    flags = (*FP32, "--deterministic", "--num-steps", "2", "--data.batch-size", "2")
    trained = train(tmp_path, "demo_internimage", INTERNIMAGE, *flags)
    assert kernels_of(trained) == ALWAYS | BY_MMA | DCNV3 | DETERMINISTIC
    expect_losses(trained, CLOSE)
    expect_weights(trained, CLOSE)


def test_steps_of_an_internimage_in_bf16_sample_as_on_the_cpu(tmp_path: Path) -> None:
    flags = (*BF16, "--num-steps", "2", "--data.batch-size", "2")
    trained = train(tmp_path, "demo_internimage", INTERNIMAGE, *flags)
    assert kernels_of(trained) == ALWAYS | BY_WARPGROUPS | DCNV3 | WINDOWED | ROUNDED
    expect_losses(trained, CLOSE_WITH_CONVOLUTIONS)


def test_no_kernel_is_left_out() -> None:
    sources = sorted((ROOT / "cuda").glob("*/sm*/*.cuh"))
    found = {
        name
        for source in sources
        for name in re.findall(
            r"__global__ void __launch_bounds__.*?(\w+_kernel)\(", source.read_text(), re.S
        )
    }
    of_dcnv3 = DCNV3 | OTHER_CALLS | WINDOWED | ROUNDED | DETERMINISTIC
    assert found == ALWAYS | SIGMOID | BY_MMA | BY_WARPGROUPS | of_dcnv3 | VIEWS


def test_a_wrong_number_in_a_kernel_is_found_with_its_operator(tmp_path: Path) -> None:
    flags = ("--fault", "number", *FP32, "--num-steps", "1")
    done = run(tmp_path, "demo", DEMO, *flags)
    assert done.returncode != 0
    assert re.search(r"m3i::mask_mix, result 0 .* by CUDA's kernels: expected", done.stderr)


def test_another_grid_is_found_though_its_numbers_are_right(tmp_path: Path) -> None:
    flags = ("--fault", "grid", *FP32, "--num-steps", "1")
    with pytest.raises(AssertionError, match="launch 0: expected as asked of CUDA"):
        train(tmp_path, "demo", DEMO, *flags)


# ---- All views of a batch: one launch, no wait, and the CPU's bits -------------------------------

VIEWS_PROGRAM = """
import sys
from pathlib import Path
import torch
from m3i_fast.benchmarks.launches.on_host import ComputeOnHost
from m3i_fast.ops.views import make_patches, make_views
from tests.null_cuda.emulated_run import held_operators
from tests.shared.cuda import emulator
from tests.shared.ops.views_cases import CASES, make

case = CASES[sys.argv[2]]
inputs = make(case)
grids = torch.randint(1, 9, (*inputs[-1].shape[:2], 2))

def views(*inputs):
    patches = make_patches(*inputs, grids, views=case.specs, patch_size=4)
    return [*make_views(*inputs, views=case.specs), *patches]

expected = views(*inputs)
major, minor = torch.cuda.get_device_capability()
held = held_operators(["views"], emulator.CUDA, 10 * major + minor)
log = Path(sys.argv[1]) / "emulated.jsonl"
with emulator.logged_launches(log), ComputeOnHost(held):
    made = views(*(tensor.cuda() for tensor in inputs))
    assert all(view.is_cuda for view in made)
    on_host = [view.cpu() for view in made]
assert all(map(torch.equal, on_host, expected))
print(*(operator.calls for operator in held.values()))
"""


@pytest.mark.parametrize("card", ["h100", "a100"])
@pytest.mark.parametrize("case", ["two sizes, every step", "blurred out of scratch memory"])
def test_views_and_patches_are_one_launch_each_with_the_bits_of_the_cpu(
    tmp_path: Path, case: str, card: str
) -> None:
    done = subprocess.run(
        program("-c", VIEWS_PROGRAM, tmp_path, case),
        env=environment(LIBRARIES, trace=tmp_path / "trace.jsonl", root=ROOT, card=card),
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.split()[-2:] == ["1", "1"], done.stderr[-3000:]
    records = read_trace(tmp_path / "trace.jsonl")
    asked = [launch_of(r) for r in records if r["kind"] == "launch" and "m3i::" in r["name"]]
    lines = (tmp_path / "emulated.jsonl").read_text().splitlines()
    assert asked == [launch_of(json.loads(line)) for line in lines]
    assert len(asked) == 2
    assert {launch[0].split("<")[0].rsplit("::", 1)[-1] for launch in asked} == VIEWS


# ---- Too long for CI -----------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("card", ["a100", "b200"])
@pytest.mark.parametrize(
    ("recipe", "ops", "flags", "tolerance"),
    [
        ("demo", DEMO, FP32, CLOSE),
        ("demo", DEMO, BF16, CLOSE_IN_BF16),
        ("demo_internimage", INTERNIMAGE, FP32, CLOSE),
        ("demo_internimage", INTERNIMAGE, BF16, CLOSE_WITH_CONVOLUTIONS),
    ],
)
def test_steps_on_other_cards_are_those_of_the_cpu(
    tmp_path: Path,
    recipe: str,
    ops: tuple[str, ...],
    flags: tuple[str, ...],
    tolerance: float,
    card: str,
) -> None:
    flags = (*flags, "--num-steps", "2", "--data.batch-size", "8")
    trained = train(tmp_path, recipe, ops, *flags, card=card)
    assert kernels_of(trained) >= ALWAYS | BY_MMA
    assert not kernels_of(trained) & BY_WARPGROUPS
    expect_losses(trained, tolerance)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("recipe", "op"),
    [
        ("demo_siglip", "boltzmann"),
        ("demo_moco_v3", "boltzmann"),
        ("demo_densecl", "boltzmann"),
        ("demo_mae", "gaussian"),
        ("demo_data2vec", "gaussian"),
    ],
)
def test_steps_of_other_methods_are_those_of_the_cpu(tmp_path: Path, recipe: str, op: str) -> None:
    trained = train(tmp_path, recipe, (op, "mask_mix"), *BF16, "--num-steps", "2")
    expect_losses(trained, CLOSE_IN_BF16)


# ---- Calls of the registry of ops, whose results `make gpu` compares on a card: streams

NAMES = [op.name for op in OPS]
WORK = ("launch", "library", "copy", "fill")


def on_null(folder: Path, code: str, *words: str, card: str = "h100") -> list[dict[str, Any]]:
    """Run a program on the null runtime; return its lines of JSON. The trace is in the folder."""
    done = subprocess.run(
        program("-c", code, *words),
        env=environment(LIBRARIES, trace=folder / "trace.jsonl", root=ROOT, card=card),
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


CAPTURED = """
import ctypes, sys
from dataclasses import replace
import torch
from m3i_fast.op_registry import OPS
from m3i_fast.ops.library import m3i  # registered

mark = ctypes.CDLL(None).null_cuda_mark
if "--plant" in sys.argv:
    launch = torch.library.get_kernel("m3i::mask_mix", "CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def on_stream_0(*args):
        with torch.cuda.stream(torch.cuda.default_stream()):
            return launch.call_boxed(keys, *args)

    library = torch.library.Library("m3i", "IMPL")
    library.impl("mask_mix", on_stream_0, "CUDA", allow_override=True)
    held = torch.empty(1, device="cuda")  # keeps its segment, for results during a capture
(op,) = (op for op in OPS if op.name == sys.argv[1])
for call in op.calls("--plant" not in sys.argv):
    inputs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in call.inputs.items()}
    call = replace(call, inputs=inputs)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call.results("cuda")  # what is prepared once
        mark(f"eager {call.what}".encode())
        call.results("cuda")
    graph = torch.cuda.CUDAGraph()
    mark(f"captured {call.what}".encode())
    with torch.cuda.graph(graph, stream=side):
        call.results("cuda")
    mark(f"replayed {call.what}".encode())
    graph.replay()
    mark(b"end")
"""


def work(step: StepTrace) -> list[tuple[str, str, int, bool]]:
    """What a step asked for, in order: kind, name, stream, and whether a capture has it."""
    return [
        (r["kind"], r["name"] if r["kind"] == "launch" else str(r.get("call", r.get("bytes"))),
         r["stream"], "capture" in r)
        for r in step.records if r["kind"] in WORK
    ]  # fmt: skip


def calls_of(folder: Path, op: str, *words: str) -> Iterator[tuple[StepTrace, ...]]:
    """Yield the eager, the captured and the replayed step of each call of an op."""
    on_null(folder, CAPTURED, op, *words)
    steps = split_at_marks(read_trace(folder / "trace.jsonl"))
    by_kind = [
        [step for step in steps if step.name.startswith(f"{kind} ")]
        for kind in ("eager", "captured", "replayed")
    ]
    assert by_kind[0]
    yield from zip(*by_kind, strict=True)


def complaints(eager: StepTrace, captured: StepTrace, replayed: StepTrace) -> list[str]:
    """Return how a captured call differs from an eager one on the same stream."""
    expected, got = work(eager), work(captured)
    (stream,) = {r["stream"] for r in captured.of("capture") if r["state"] == "begin"}
    found = [f"{each[1]}: eager on stream {each[2]}" for each in expected if each[2] != stream]
    found += [f"{each[1]}: captured on stream {each[2]}" for each in got if each[2] != stream]
    found += [f"{each[1]}: in no capture" for each in got if not each[3]]
    if [each[:2] for each in expected] != [each[:2] for each in got]:
        found.append(f"expected the eager call's {expected}, got {got}")
    launches = sum(each[0] in ("launch", "library") for each in expected)
    (replay,) = replayed.of("replay")
    if replay["launches"] != launches or not launches:
        found.append(f"expected {launches} launches of a replay, got {replay['launches']}")
    return found


@pytest.mark.parametrize("op", NAMES)
def test_a_captured_call_has_all_kernels_of_the_eager_one(tmp_path: Path, op: str) -> None:
    for eager, captured, replayed in calls_of(tmp_path, op):
        assert complaints(eager, captured, replayed) == [], eager.name


def test_a_kernel_on_another_stream_is_found(tmp_path: Path) -> None:
    for steps in calls_of(tmp_path, "mask_mix", "--plant"):
        found = complaints(*steps)
        for fault in ("captured on stream 0", "in no capture", "1 launches of a replay, got 0"):
            assert any(fault in each for each in found), found


# ---- Calls of the registry of ops: numbers

COMPUTED = """
import json, sys
import torch
from m3i_fast.benchmarks.launches.on_host import ComputeOnHost
from m3i_fast.benchmarks.launches.trace import launched, our_kernel
from m3i_fast.op_registry import OPS
from tests.null_cuda.emulated_run import held_operators
from tests.shared.cuda import emulator

(op,) = (op for op in OPS if op.name == sys.argv[1])
major, minor = torch.cuda.get_device_capability()
# Margin 2: the CPU's kernels, too, may differ from float64 by as much as is right.
held = held_operators([op.name], emulator.CUDA, 10 * major + minor, margin=2.0)
for call in op.calls(False):
    kernels = {our_kernel(name) for name in launched(lambda: call.results("cuda"))} - {None}
    with ComputeOnHost(held):
        error = call.error("cuda")
    print(json.dumps({"what": call.what, "error": error, "kernels": sorted(kernels)}))
assert any(each.calls for each in held.values())
"""
CAPABILITIES = {"h100": "9.0", "a100": "8.0"}


@pytest.mark.parametrize("card", CAPABILITIES)
def test_results_of_cuda_kernels_are_right_and_no_kernel_of_a_step_is_left_out(
    tmp_path: Path, card: str
) -> None:
    """The emulator computes them from the sources; those of GPU sizes are computed on a GPU."""
    rows = [row for op in NAMES for row in on_null(tmp_path, COMPUTED, op, card=card)]
    assert {row["what"]: row["error"] for row in rows if not row["error"] <= 1} == {}
    expected = json.loads((ROOT / "scripts" / "gpu" / "expected.json").read_text())
    compared = {kernel for row in rows for kernel in row["kernels"]}
    assert expected[CAPABILITIES[card]]["kernels"].keys() - compared == set()
