"""The choice of arithmetic on machines that are given, and what a real step multiplies."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from m3i_fast.benchmarks.core.random_batch import draw_batch
from m3i_fast.config import Backend, Precision, TrainConfig
from m3i_fast.config.models.vit import vit_b, vit_l
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.costs.gemm_shapes import gemm_shapes
from m3i_fast.engine.build import build_objective
from m3i_fast.engine.precision import fp8
from m3i_fast.engine.precision.arithmetic import (
    Arithmetic,
    Capabilities,
    autocast,
    capabilities_of,
    compute_dtype,
    log_arithmetic,
    resolve_precision,
)
from m3i_fast.engine.precision.fp8 import (
    expect_fp8,
    forward_context,
    keep_calls_apart,
    layers_of,
)
from m3i_fast.engine.train_step import ForwardPass
from m3i_fast.engine.trainer import Trainer
from m3i_fast.models.transformer import float8
from m3i_fast.models.transformer.blocks import TORCH_LAYERS
from m3i_fast.objectives.methods import CAPTION_TOKENS
from m3i_fast.planning.step_memory import draw_first_mix
from m3i_fast.recipes import demo, recipes
from tests.engine.precision.fp8_runs import tiny

CPU = Capabilities(device="cpu", torchao=True)
A100 = Capabilities(device="cuda", capability=(8, 0), cuda=(13, 0), te=True, torchao=True)
L40S = replace(A100, capability=(8, 9))
H100 = replace(A100, capability=(9, 0))
B200 = replace(A100, capability=(10, 0))
RTX5090 = replace(A100, capability=(12, 0))
OLD_CUDA = replace(H100, cuda=(12, 8))
BARE = replace(H100, te=False, torchao=False)
ONLY_TE, ONLY_TORCHAO = replace(H100, torchao=False), replace(H100, te=False)


def big(batch_size: int = 128) -> TrainConfig:
    """ViT-L, images encoded alone, so that rows differ by part; a decoder that is narrower."""
    cfg = recipes()["m3i_vit_b"]()
    objective = replace(
        cfg.objective,
        mixing=replace(cfg.objective.mixing, mode="own_image"),
        decoder=replace(cfg.objective.decoder, dim=512),
    )
    data = replace(cfg.data, batch_size=batch_size)
    return replace(cfg, vision=vit_l(), data=data, objective=objective)


def resolve(
    machine: Capabilities,
    precision: Precision,
    backend: Backend = "auto",
    *,
    cfg: TrainConfig | None = None,
    compiled: bool = False,
) -> Arithmetic:
    return resolve_precision(
        machine, gemm_shapes(cfg or big()), precision, backend, compiled=compiled
    )


@pytest.mark.parametrize(
    ("machine", "precision", "backend", "recipe", "library", "alignment"),
    [
        (CPU, "auto", "auto", "fp32", "torch", 1),
        (CPU, "bf16", "torch", "bf16", "torch", 1),
        (CPU, "fp8_current", "auto", "fp8_current", "torchao", 16),
        (A100, "auto", "auto", "bf16", "torch", 1),
        (A100, "bf16", "te", "bf16", "te", 1),
        (H100, "auto", "auto", "bf16", "torch", 1),
        (H100, "fp32", "auto", "fp32", "torch", 1),
        (H100, "fp8_current", "auto", "fp8_current", "te", 16),
        (H100, "fp8_current", "torchao", "fp8_current", "torchao", 16),
        (ONLY_TORCHAO, "fp8_current", "auto", "fp8_current", "torchao", 16),
        (ONLY_TE, "fp8_current", "auto", "fp8_current", "te", 16),
        (L40S, "fp8_delayed", "auto", "fp8_delayed", "te", 16),
        (H100, "fp8_block", "te", "fp8_block", "te", 128),
        (B200, "mxfp8", "auto", "mxfp8", "te", 32),
        (B200, "fp8_delayed", "auto", "fp8_delayed", "te", 16),
        (RTX5090, "fp8_current", "auto", "fp8_current", "te", 16),
    ],
)
def test_what_each_machine_takes(
    machine: Capabilities,
    precision: Precision,
    backend: Backend,
    recipe: str,
    library: str,
    alignment: int,
) -> None:
    found = resolve(machine, precision, backend)
    assert (found.recipe, found.backend, found.alignment) == (recipe, library, alignment)
    assert found.compute_dtype == (torch.float32 if recipe == "fp32" else torch.bfloat16)
    assert found.is_fp8 == (precision not in ("auto", "fp32", "bf16"))
    assert bool(found.warning) == (found.backend == "torchao")  # which is not compiled here
    assert found.reasons and all(reason.endswith(".") for reason in found.reasons)


@pytest.mark.parametrize(
    ("machine", "precision", "backend", "words"),
    [
        (A100, "fp8_current", "auto", ["sm_80", "sm_89 or newer", "--precision bf16"]),
        (A100, "fp8_current", "torchao", ["sm_80", "sm_89 or newer", "--precision bf16"]),
        (A100, "fp8_delayed", "te", ["sm_80", "--precision bf16"]),
        (replace(CPU, torchao=False), "fp8_current", "auto", ["a CPU", 'install "m3i-fast[fp8]"']),
        (CPU, "fp8_delayed", "auto", ["a CPU", "Transformer Engine", "fp8_current"]),
        (CPU, "bf16", "te", ["needs a GPU", "--backend torch"]),
        (CPU, "fp8_current", "te", ["needs a GPU", "torchao"]),
        (H100, "mxfp8", "auto", ["sm_90", "Blackwell", "--precision fp8_current"]),
        (RTX5090, "mxfp8", "auto", ["sm_120", "Blackwell, sm_100", "--precision fp8_current"]),
        (B200, "fp8_block", "auto", ["sm_100", "Hopper", "--precision fp8_current"]),
        (OLD_CUDA, "fp8_block", "auto", ["12.9", "12.8", "--precision fp8_current"]),
        (BARE, "fp8_current", "auto", ["neither", "m3i-fast[te]", "m3i-fast[fp8]"]),
        (ONLY_TORCHAO, "fp8_delayed", "auto", ["m3i-fast[te]", "--precision fp8_current"]),
        (ONLY_TORCHAO, "fp8_current", "te", ["not installed", "m3i-fast[te]", "torchao"]),
        (ONLY_TORCHAO, "bf16", "te", ["not installed", "m3i-fast[te]", "--backend torch"]),
        (ONLY_TE, "fp8_current", "torchao", ["not installed", "m3i-fast[fp8]", "--backend te"]),
        (H100, "fp8_current", "torch", ["auto, te or torchao", "--backend auto"]),
        (H100, "bf16", "torchao", ["torch or te", "--backend torch"]),
        (H100, "fp8_block", "torchao", ["expected te", "--backend te"]),
    ],
)
def test_refusals_say_what_to_change(
    machine: Capabilities, precision: Precision, backend: Backend, words: list[str]
) -> None:
    with pytest.raises(ValueError, match="^(precision|backend): ") as refused:
        resolve(machine, precision, backend)
    assert all(word in str(refused.value) for word in words), refused.value


def test_compiled_blocks_take_torchao_and_no_transformer_engine() -> None:
    assert resolve(H100, "fp8_current", compiled=True).backend == "torchao"
    for machine, precision, backend in (
        (H100, "fp8_delayed", "auto"),
        (H100, "fp8_current", "te"),
        (H100, "bf16", "te"),
        (ONLY_TE, "fp8_current", "auto"),
        (B200, "mxfp8", "auto"),
    ):
        with pytest.raises(ValueError, match="^compile: expected False.*--no-compile"):
            resolve(machine, precision, backend, compiled=True)  # type: ignore[arg-type]


def test_delayed_scales_are_shared_by_ranks_unless_a_module_runs_twice() -> None:
    cfg = big()
    assert cfg.data.local_views is None
    mixing = replace(cfg.objective.mixing, dense_fraction=1.0)
    intra = tuple(term for term in cfg.objective.active_terms if term.name != "inter")
    alone = replace(cfg, objective=replace(cfg.objective, mixing=mixing, terms=intra))
    found = resolve(H100, "fp8_delayed", cfg=alone)
    assert gemm_shapes(alone).max_calls == 1 and found.reduce_amax
    local = replace(cfg.data.global_views, size=96, count=2)
    found = resolve(
        H100, "fp8_delayed", cfg=replace(alone, data=replace(cfg.data, local_views=local))
    )
    assert not found.reduce_amax
    assert "runs 2 times in a step" in found.reasons[-1]
    assert gemm_shapes(replace(cfg, parallel=ParallelConfig(chunk=32))).max_calls == 4


# ---- Alignment -----------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_names_the_nearest_that_do() -> None:
    cfg = big(40)  # 98 cells and a class token of each image
    cfg = replace(cfg, vision=replace(cfg.vision, class_token=True))
    with pytest.raises(ValueError, match=r"16, got 40 .*3960 tokens.*--data.batch-size 32 or 48$"):
        resolve(H100, "fp8_current", cfg=cfg)
    for batch_size in (32, 48):
        legal = replace(cfg, data=replace(cfg.data, batch_size=batch_size))
        assert resolve(H100, "fp8_current", cfg=legal).alignment == 16
        with pytest.raises(ValueError, match="a multiple of 128.*--data.batch-size 128"):
            resolve(H100, "fp8_block", cfg=legal)


def test_images_that_stochastic_depth_leaves_out_are_looked_at() -> None:
    cfg = big(64)
    for mode, rate in (("mask", 0.3), ("subset", 0.0)):
        vision = replace(cfg.vision, drop_path_rate=rate, drop_path_mode=mode)
        resolve(H100, "fp8_current", cfg=replace(cfg, vision=vision))
    vision = replace(cfg.vision, drop_path_rate=0.3, drop_path_mode="subset")
    with pytest.raises(ValueError, match="a multiple of 16, got 64 images: encoder: .* tokens"):
        resolve(H100, "fp8_current", cfg=replace(cfg, vision=vision))


def test_chunks_and_changing_masks_are_looked_at() -> None:
    cfg = big(64)
    resolve(H100, "fp8_current", cfg=cfg)
    with pytest.raises(ValueError, match="encoder: 2058 tokens"):  # 98 cells of 21 images
        resolve(H100, "fp8_current", cfg=replace(cfg, parallel=ParallelConfig(chunk=22)))
    mixing = replace(cfg.objective.mixing, mode="masked", mask_ratio=0.5, final_mask_ratio=0.75)
    cfg = replace(big(24), objective=replace(cfg.objective, mixing=mixing), num_steps=500)
    rows = {rows for part, rows in gemm_shapes(cfg).rows(24) if part == "encoder"}
    assert rows == {24 * shown for shown in range(49, 99)}
    with pytest.raises(ValueError, match="encoder: .* tokens"):
        resolve(H100, "fp8_current", cfg=cfg)


def test_what_is_narrow_stays_in_bf16_and_the_model_must_have_something_wide() -> None:
    found = resolve(H100, "fp8_current")
    parts = dict(found.products)
    assert parts.keys() == {"encoder", "target encoder"}
    assert parts["encoder"] == ((1024, 3072), (1024, 1024), (1024, 4096), (4096, 1024))
    assert any("Too narrow" in reason and "text encoder" in reason for reason in found.reasons)
    every = dict(resolve(H100, "fp8_current", cfg=replace(big(), fp8_min_dim=512)).products)
    assert {"text encoder", "decoder of intra", "cells asked by inter"} < every.keys()
    base = replace(big(), vision=vit_b(), fp8_min_dim=1024)
    with pytest.raises(ValueError, match="widest is 768 x 2304: --fp8-min-dim 768|widest is 768"):
        resolve(H100, "fp8_current", cfg=base)
    with pytest.raises(ValueError, match="fp8_min_dim: expected 1 to 65536, got 0"):
        replace(demo(), fp8_min_dim=0)


# ---- A real step ---------------------------------------------------------------------------------


def _step(cfg: TrainConfig, choice: Arithmetic) -> ForwardPass:
    """Objective of a run; its FP8 products are those of `choice`."""
    torch.manual_seed(0)
    step = ForwardPass(build_objective(cfg, layers=layers_of(choice, cfg.fp8_min_dim)))
    keep_calls_apart(step, choice)
    return step


def _forward(step: ForwardPass, cfg: TrainConfig, choice: Arithmetic) -> torch.Tensor:
    with forward_context(choice, torch.device("cpu")):
        loss, _ = step(
            draw_batch(cfg),
            draw_first_mix(cfg),
            lambda _: fp8.ExitStack(),
            monitor=False,
            measure=False,
        )
    return loss


@pytest.mark.parametrize(
    ("chunk", "drop_path", "writes"),
    [(0, 0.0, False), (4, 0.0, False), (0, 0.5, False), (0, 0, True)],
)
def test_the_rows_of_a_real_step_are_those_that_were_checked(
    chunk: int, drop_path: float, writes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """drop_path: half of the images, which still fit, skip the last layer. writes: captions."""
    cfg = replace(tiny(tmp_path, precision="fp8_current"), parallel=ParallelConfig(chunk=chunk))
    if writes:
        terms = *cfg.objective.terms, CAPTION_TOKENS
        cfg = replace(cfg, objective=replace(cfg.objective, terms=terms))
    vision = replace(cfg.vision, drop_path_rate=drop_path, drop_path_mode="subset")
    cfg = replace(cfg, vision=vision)
    choice = resolve(CPU, "fp8_current", cfg=cfg)
    found: Counter[int] = Counter()
    plain = float8._Product.apply

    def count(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        found[x[..., 0].numel()] += 1
        return plain(x, *arguments)

    monkeypatch.setattr(float8._Product, "apply", count)
    _forward(_step(cfg, choice), cfg, choice)
    assert set(found) == {rows for _, rows in gemm_shapes(cfg).rows(cfg.data.batch_size)}
    assert not any(rows % 16 for rows in found)


def test_a_run_that_has_no_fp8_product_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = tiny(tmp_path, precision="fp8_current")
    choice = resolve(CPU, "fp8_current", cfg=cfg)
    torch.manual_seed(0)
    plain = ForwardPass(build_objective(cfg, layers=TORCH_LAYERS))
    expect_fp8(plain, choice)
    with pytest.raises(RuntimeError, match="expected fp8_current by torchao in encoder"):
        _forward(plain, cfg, choice)
    step = _step(cfg, choice)
    expect_fp8(step, choice)
    with caplog.at_level(logging.INFO):
        first = _forward(step, cfg, choice)
        _forward(step, cfg, choice)  # asked once
    assert [r.message for r in caplog.records if "first forward" in r.message] == [
        "precision: 40 in fp8_current in the first forward pass"
    ]
    first.backward()


def test_transformer_engine_is_asked_which_layers_quantised() -> None:
    choice = replace(resolve(H100, "fp8_current"), backend="te")
    for initialized in (True, False):
        layer = torch.nn.Identity()
        layer.fp8_initialized = False  # type: ignore[assignment]
        model = torch.nn.Sequential(layer)
        expect_fp8(model, choice)
        layer.fp8_initialized = initialized  # type: ignore[assignment]
        if initialized:
            model(torch.zeros(1))
        else:
            with pytest.raises(RuntimeError, match="by te in encoder"):
                model(torch.zeros(1))


def test_a_wrong_request_is_refused_before_anything_is_written(
    dataset: Path, tmp_path: Path
) -> None:
    cfg = replace(tiny(dataset, precision="fp8_current"), compile=False)
    cfg = replace(cfg, data=replace(cfg.data, batch_size=6))
    with pytest.raises(ValueError, match=r"--data.batch-size 4 or 8"):
        Trainer(cfg, tmp_path / "run")
    with pytest.raises(ValueError, match="backend: te needs a GPU"):
        Trainer(replace(cfg, precision="bf16", backend="te"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_this_machine_and_the_log(caplog: pytest.LogCaptureFixture) -> None:
    found = capabilities_of(torch.device("cpu"))
    assert (found.device, found.capability, found.torchao) == ("cpu", None, True)
    with caplog.at_level(logging.INFO):
        log_arithmetic(resolve(found, "fp8_current"))
        log_arithmetic(resolve(found, "bf16"))
        log_arithmetic(resolve(ONLY_TORCHAO, "fp8_current"))
        log_arithmetic(resolve(ONLY_TORCHAO, "fp8_current", compiled=True))
        log_arithmetic(resolve(H100, "fp8_current"))
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [
        "precision: fp8_current is emulated on a CPU, for its numbers: it is slower than bf16",
        "precision: fp8_current by torchao launches seven times as many kernels as bf16 unless "
        "the blocks are compiled; set --compile or --precision bf16",
    ]
    assert len(caplog.records) == 5 + len(warnings)


def test_what_is_evaluated_after_fp8_is_bf16() -> None:
    cpu = torch.device("cpu")
    assert [compute_dtype(p, cpu) for p in ("auto", "fp32", "bf16", "fp8_current", "mxfp8")] == [
        torch.float32,
        torch.float32,
        *(torch.bfloat16,) * 3,
    ]
    with autocast("fp8_block", cpu):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
