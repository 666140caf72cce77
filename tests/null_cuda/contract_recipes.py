"""Recipes on the null device: what a steady step asks of a GPU, by card and by way of training.

And packed pictures: FlashAttention's kernels, and no wait in a step.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.benchmarks.launches.trace import StepTrace, lines_of, read_trace, split_at_marks
from scripts.null_cuda import environment, program
from tests.null_cuda.contract_runtime import of_kind, on_null

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ROOT / "build" / "null"

# Kernels of ours that a bf16 step of the demo launches on each card.
KERNELS = {
    "a100": {"boltzmann_sums_kernel", "boltzmann_logit_grads_kernel", "mask_mix_kernel"},
    "h100": {"boltzmann_sums_hopper_kernel", "boltzmann_grads_hopper_kernel"},
}


def train(
    tmp_path: Path, recipe: str, *flags: str, **settings: object
) -> tuple[dict[str, float], list[StepTrace]]:
    """Train a recipe for a few steps; return its last metrics and the steps of the trace."""
    tmp_path.mkdir(exist_ok=True)
    trace = tmp_path / "trace.jsonl"
    variables = environment(LIBRARIES, trace=trace, root=ROOT, **settings)
    command = program("-m", "m3i_fast.benchmarks.launches.one_run", recipe, *flags)
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=900, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return metrics, split_at_marks(read_trace(trace))


def steady(steps: list[StepTrace]) -> StepTrace:
    """Return the third step: nothing is new in it, and no monitor is due."""
    (step,) = (step for step in steps if step.name == "step 2")
    return step


def expect_steady(step: StepTrace) -> None:
    """Hold what a step of a running training must not do, each with its Python line."""
    assert not step.of("error") and not step.of("fault") and not step.of("unsupported")
    assert not lines_of(step.of("wait"))
    assert not lines_of(step.of("allocate"))
    with_host = [copy for copy in step.of("copy") if "pageable" in (copy["from"], copy["to"])]
    assert not lines_of(with_host)


def kernels_of(step: StepTrace) -> set[str]:
    """Return the names of our own kernels that the step launched."""
    own = (launch["name"] for launch in step.of("launch") if "m3i::" in launch["name"])
    return {name.split("<")[0].split("(")[0].rsplit("::", 1)[-1] for name in own}


@pytest.mark.parametrize("card", ["a100", "h100"])
def test_a_steady_step_of_the_demo_neither_waits_nor_allocates(tmp_path: Path, card: str) -> None:
    metrics, steps = train(tmp_path, "demo", card=card)
    assert metrics["step"] == 4
    step = steady(steps)
    expect_steady(step)
    assert step.streams == {0}
    assert kernels_of(step) >= KERNELS[card]
    architectures = {launch["architecture"] for launch in step.of("launch")}
    assert max(architectures) == (90 if card == "h100" else 80)


def test_a_wait_planted_in_the_step_is_found_with_its_line(tmp_path: Path) -> None:
    _, steps = train(tmp_path, "demo", "--plant-wait")
    waits = lines_of(steady(steps).of("wait"))
    assert len(waits) == 1
    (line,) = waits
    path, number = line.rsplit(":", 1)
    assert Path(path).read_text().splitlines()[int(number) - 1].strip().endswith(".item()")


def test_the_computed_demo_has_the_losses_of_the_cpu(tmp_path: Path) -> None:
    """The same steps in float32 on the CPU and computed on the null device, where each kernel of
    ours is that of the CPU. AdamW: on a GPU Muon's iterations are in bf16."""
    flags = ("--computed", "--precision", "fp32", "--optim.matrices", "adamw")
    on_null, _ = train(tmp_path / "null", "demo", *flags)
    on_cpu, _ = train(tmp_path / "cpu", "demo", *flags, "--device", "cpu")
    losses = [name for name in on_cpu if name.startswith("loss/")]
    assert len(losses) >= 5
    assert {name: on_null[name] for name in losses} == pytest.approx(
        {name: on_cpu[name] for name in losses}, rel=1e-6
    )


# ---- Packed pictures -----------------------------------------------------------------------------

PACKED_PROGRAM = """
import os
from m3i_fast.config.models.vit import vit_s
from m3i_fast.models.transformer.vit import ViT

vit = ViT(vit_s(depth=2, **{options})).cuda().train()
grids = torch.tensor([(3, 5), (4, 4), (14, 7), (1, 1), (10, 12)])
patches = torch.zeros(int(grids.prod(1).sum()), 768, device="cuda")
for step in range(2):
    mark(f"step {{step}}".encode())
    with torch.autocast("cuda", torch.bfloat16):
        encoded = vit.encode_pictures(patches, grids)
    encoded.cells.float().sum().backward()
mark(b"end")
print(json.dumps(list(encoded.cells.shape)), flush=True)
os._exit(0)  # autograd's threads may abort so short a process while it ends
"""
TRAIN_PROGRAM = """
import os
from dataclasses import replace
from m3i_fast.benchmarks.core.random_batch import draw_any_batch
from m3i_fast.costs.gemm_shapes import gemm_shapes
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.precision.arithmetic import capabilities_of, resolve_precision
from m3i_fast.engine.train_step import build_train_step
from m3i_fast.recipes import recipes

cfg = recipes()["{name}"]()
small = replace(cfg.vision, dim=128, depth=2, num_heads=2)
data = replace(cfg.data, max_tokens_per_batch=2400)
decoder = replace(cfg.objective.decoder, dim=128, depth=2, num_heads=2)
objective = replace(cfg.objective, decoder=decoder)
text = replace(cfg.text, depth=1)
cfg = replace(cfg, vision=small, text=text, data=data, objective=objective)
device = torch.device("cuda")
arithmetic = resolve_precision(
    capabilities_of(device), gemm_shapes(cfg), cfg.precision, cfg.backend, compiled=False
)
step, batch = build_train_step(cfg, World(device), arithmetic), draw_any_batch(cfg)
for number in range(3):
    mark(f"step {{number}}".encode())
    step(batch.to(device))
mark(b"end")
print(json.dumps(batch.batch_size), flush=True)
os._exit(0)
"""
PACKED_OPTIONS = {
    "absolute": {"class_token": True},
    "rotary": {"position": "rotary", "num_registers": 4, "activation_checkpointing": "selective"},
}


@pytest.mark.parametrize("name", PACKED_OPTIONS)
def test_a_step_of_packed_pictures_waits_for_nothing(tmp_path: Path, name: str) -> None:
    program = PACKED_PROGRAM.format(options=PACKED_OPTIONS[name])
    shape, trace = on_null(tmp_path, program, card="a100")
    assert shape == [15 + 16 + 98 + 1 + 120, 384]
    records = {step.name: step.records for step in split_at_marks(trace)}["step 1"]
    kernels = [record["name"] for record in of_kind(records, "launch")]
    # one of each a block, whatever the number of lengths; the result is kept, not computed again
    assert sum("flash_fwd_kernel" in kernel for kernel in kernels) == 2
    assert sum("flash_bwd_dq_dk_dv" in kernel for kernel in kernels) == 2
    assert of_kind(records, "wait") == []
    copies = of_kind(records, "copy")
    assert copies and not [copy for copy in copies if "pageable" in (copy["from"], copy["to"])]


@pytest.mark.parametrize("name, decoded", [("any_shape_vit_b", 0), ("any_shape_m3i_vit_b", 2)])
def test_a_training_step_on_views_of_any_shape_waits_for_nothing(
    tmp_path: Path, name: str, decoded: int
) -> None:
    pictures, trace = on_null(tmp_path, TRAIN_PROGRAM.format(name=name), card="a100")
    assert pictures > 1
    records = {step.name: step.records for step in split_at_marks(trace)}["step 2"]
    kernels = [record["name"] for record in of_kind(records, "launch")]
    # two blocks of the encoder and of the moving average, over all views of all pictures, and of
    # the decoder, over all its questions
    assert sum("flash_fwd_kernel" in kernel for kernel in kernels) == 4 + decoded
    assert sum("flash_bwd_dq_dk_dv" in kernel for kernel in kernels) == 2 + decoded
    assert of_kind(records, "wait") == of_kind(records, "allocate") == []
    copies = of_kind(records, "copy")
    assert copies and not [copy for copy in copies if "pageable" in (copy["from"], copy["to"])]


# ---- Attention: torch's operators, and the backend of packed ones. The null cuDNN has its real
# version, so that torch prefers cuDNN where a card would.

ATTENTION_PROGRAM = """
import os
from dataclasses import replace
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from m3i_fast.benchmarks.core.random_batch import draw_any_batch
from m3i_fast.costs.gemm_shapes import gemm_shapes
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.precision.arithmetic import capabilities_of, resolve_precision
from m3i_fast.engine.precision.determinism import make_deterministic
from m3i_fast.engine.train_step import build_train_step
from m3i_fast.recipes import recipes

class Attention(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if "attn" in name or "attention" in name:
            name = name.split("::")[1].removeprefix("_scaled_dot_product_")
            if name == "_varlen_attn":
                name += " " + SDPBackend(args[14] if len(args) > 14 else 1).name
            found.add(name)
        return func(*args, **(kwargs or {{}}))

torch.backends.cudnn.enabled = False  # of convolutions: the null cuDNN has no engines
found, any_shape = set(), {any_shape}
cfg = recipes()["any_shape_m3i_vit_b" if any_shape else "m3i_vit_b"]()
data = replace(cfg.data, **(dict(max_tokens_per_batch=2400) if any_shape else dict(batch_size=4)))
cfg = replace(
    cfg,
    vision=replace(cfg.vision, dim=128, depth=2, num_heads=2, **{vision}),
    text=replace(cfg.text, depth=1),
    data=data,
    objective=replace(
        cfg.objective, decoder=replace(cfg.objective.decoder, dim=128, depth=2, num_heads=2)
    ),
    deterministic={deterministic},
    compile=False,
)
device = torch.device("cuda")
if cfg.deterministic:
    make_deterministic(cfg, device)
arithmetic = resolve_precision(
    capabilities_of(device), gemm_shapes(cfg), cfg.precision, cfg.backend, compiled=False
)
step, batch = build_train_step(cfg, World(device), arithmetic), draw_any_batch(cfg)
for number in range(2):
    mark(f"step {{number}}".encode())
    with Attention():
        step(batch.to(device))
mark(b"end")
print(json.dumps([step.attention.kernel, sorted(found)]), flush=True)
os._exit(0)
"""
FLASH = {"flash_attention", "flash_attention_backward"}
EFFICIENT = {"efficient_attention", "efficient_attention_backward"}
VARLEN = {"_varlen_attn FLASH_ATTENTION", "_varlen_attn_backward"}


def attention_of(
    folder: Path,
    card: str,
    *,
    any_shape: bool = False,
    deterministic: bool = False,
    vision: dict[str, str] | None = None,
) -> tuple[str, set[str], list[Any]]:
    """Return the step's kernel, the attention operators of two steps, and its calls of cuDNN."""
    program = ATTENTION_PROGRAM.format(
        any_shape=any_shape, deterministic=deterministic, vision=vision or {}
    )
    (kernel, found), trace = on_null(folder, program, card=card)
    steps = [record for step in split_at_marks(trace) for record in step.records]
    calls = [each for each in of_kind(steps, "library") if each["library"] == "cudnn"]
    return kernel, set(found), calls


@pytest.mark.parametrize("card", ["a100", "h100", "b200"])
@pytest.mark.parametrize(
    "case", ["plain", "deterministic", "any shape", "deterministic, any shape"]
)
def test_every_card_runs_the_attention_that_was_chosen(
    tmp_path: Path, card: str, case: str
) -> None:
    """FlashAttention; a caption's mask, which it does not take, runs another kernel."""
    kernel, found, calls = attention_of(
        tmp_path, card, any_shape="any shape" in case, deterministic="deterministic" in case
    )
    masked = {"attention_math"} if "deterministic" in case else EFFICIENT
    packed = VARLEN if "any shape" in case else FLASH
    assert kernel == "flash"
    assert found >= packed
    assert found <= FLASH | VARLEN | masked, found
    assert calls == []  # no plan of cuDNN, in any step


@pytest.mark.parametrize("any_shape", [False, True])
def test_math_runs_no_fused_kernel(tmp_path: Path, any_shape: bool) -> None:
    kernel, found, _ = attention_of(
        tmp_path, "h100", any_shape=any_shape, vision={"attention": "math"}
    )
    assert kernel == "math" and not found & (FLASH | EFFICIENT | VARLEN)
