"""Which attention a bf16 step runs on each card: torch's operators, and the backend of packed ones.

cuDNN has its real version on the null runtime, so that torch prefers it where a card would.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from m3i_fast.benchmarks.launches.trace import split_at_marks
from tests.null_cuda.contract_runtime import of_kind, on_null

PROGRAM = """
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
    program = PROGRAM.format(any_shape=any_shape, deterministic=deterministic, vision=vision or {})
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
