"""Products of a CPU's step: which library computes them, and that they stay those of fp32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from m3i_fast.benchmarks.training import explain_step
from m3i_fast.costs.gemm_shapes import gemm_shapes
from m3i_fast.engine.precision import cpu_products
from m3i_fast.engine.precision.arithmetic import capabilities_of, resolve_precision
from m3i_fast.objectives.step_context import no_stage
from m3i_fast.recipes import recipes

CPU = torch.device("cpu")
MATMUL = torch.backends.mkldnn.matmul


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU where oneDNN is faster; skipped where its products are not those of fp32."""
    if not cpu_products.keeps_fp32():
        pytest.skip("oneDNN rounds fp32 matrices to bf16 on this CPU")
    monkeypatch.setattr(cpu_products, "by_onednn", lambda: True)


@pytest.mark.parametrize(
    ("vendor", "capability", "exact", "expected"),
    [
        ("AuthenticAMD", "AVX512", True, True),
        ("AuthenticAMD", "AVX2", True, False),
        ("AuthenticAMD", "AVX512", False, False),
        ("GenuineIntel", "AVX512", True, False),
    ],
)
def test_onednn_is_taken_where_it_is_exact_and_faster(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    vendor: str,
    capability: str,
    exact: bool,
    expected: bool,
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: some\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(cpu_products, "keeps_fp32", lambda: exact)
    assert cpu_products.by_onednn(cpuinfo) is expected
    assert not cpu_products.by_onednn(tmp_path / "none")


@pytest.mark.usefixtures("chosen")
def test_products_and_attention_are_those_of_fp32() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 300, generator=rng) for _ in range(2))
    q, k, v = (torch.randn(2, 3, 50, 64, generator=rng) for _ in range(3))
    wide = (
        a.double() @ b.double(),
        F.scaled_dot_product_attention(q.double(), k.double(), v.double()),
    )
    with cpu_products.fast_cpu_products(CPU, torch.float32):
        got = a @ b, F.scaled_dot_product_attention(q, k, v)
    for value, expected in zip(got, wide, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-4)
    rounded = a.bfloat16().double() @ b.bfloat16().double()
    assert (rounded - wide[0]).abs().max() > 1e-2  # what those of bf16 would differ by


@pytest.mark.usefixtures("chosen")
def test_the_process_is_as_before_whatever_ends_the_step() -> None:
    before = MATMUL.fp32_precision, torch.backends.cuda.flash_sdp_enabled()
    with (
        pytest.raises(KeyboardInterrupt),
        cpu_products.fast_cpu_products(CPU, torch.float32),
    ):
        assert MATMUL.fp32_precision == "bf16"
        assert not torch.backends.cuda.flash_sdp_enabled()
        raise KeyboardInterrupt
    assert (MATMUL.fp32_precision, torch.backends.cuda.flash_sdp_enabled()) == before
    with cpu_products.fast_cpu_products(torch.device("cuda"), torch.bfloat16):
        assert (MATMUL.fp32_precision, torch.backends.cuda.flash_sdp_enabled()) == before


def test_a_step_has_the_loss_that_it_has_without(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu_products.keeps_fp32():
        pytest.skip("oneDNN rounds fp32 matrices to bf16 on this CPU")
    train = explain_step.with_batch(recipes()["demo"](), batch_size=8, device="cpu")
    train = replace(train, optim=replace(train.optim, warmup_fraction=0.0))
    arithmetic = resolve_precision(
        capabilities_of(CPU), gemm_shapes(train), "fp32", "torch", compiled=False
    )
    losses, seen = {}, []
    for on in (True, False):
        monkeypatch.setattr(cpu_products, "by_onednn", lambda on=on: on)
        take = explain_step.build_step(train, arithmetic, no_stage)
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda *_: seen.append(MATMUL.fp32_precision)
        )
        losses[on] = [take()["loss/total"].item() for _ in range(3)]
        hook.remove()
    assert set(seen) == {"bf16", "none"}
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
