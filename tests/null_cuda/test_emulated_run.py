"""Operators of ours computed by the emulator and held to the CPU's: what of it needs no device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.null_cuda.emulated_run import FAULTS, Held, held_operators, plant
from tests.shared.cuda import emulator

m3i = torch.ops.m3i


def mask_mix_arguments() -> tuple[object, ...]:
    rng = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (4, 3, 32, 32), generator=rng, dtype=torch.uint8)
    choice = torch.randint(0, 2, (2, 4, 4), generator=rng, dtype=torch.uint8)
    return (
        views,
        choice,
        torch.tensor([[0, 1], [2, 3]]),
        [0.4, 0.5, 0.6],
        [0.2, 0.3, 0.4],
        torch.float32,
    )


def test_an_operator_is_computed_by_its_cuda_kernels(tmp_path: Path) -> None:
    operator = held_operators(["mask_mix"], emulator.CUDA, 80)[m3i.mask_mix.default]
    log = tmp_path / "launches.jsonl"
    with emulator.logged_launches(log):
        out = operator(*mask_mix_arguments())
    m3i.mask_mix(*mask_mix_arguments())  # the CPU's, which launches nothing
    torch.testing.assert_close(out, m3i.mask_mix(*mask_mix_arguments()))
    assert operator.calls == 1
    (launch,) = map(json.loads, log.read_text().splitlines())
    assert launch["name"] == "void m3i::mask_mix::mask_mix_kernel<float, 4>(m3i::MaskMixParams)"
    assert launch["grid"][1] == 2  # pictures


def test_a_wrong_kernel_is_refused_with_its_operator(tmp_path: Path) -> None:
    folder = plant(FAULTS["number"], ["mask_mix"], tmp_path)
    operator = held_operators(["mask_mix"], folder, 80)[m3i.mask_mix.default]
    with pytest.raises(ValueError, match=r"m3i::mask_mix, result 0 \[2, 3, 32, 32\] by CUDA's"):
        operator(*mask_mix_arguments())


def test_what_means_nothing_is_not_compared() -> None:
    """The flag `run` of boltzmann's operators, here with kernels that return a NaN."""

    def by_cuda(*args: object) -> tuple[torch.Tensor, ...]:
        return torch.full((2,), torch.nan), torch.full((3,), torch.nan)

    rows = torch.ones(2, 4), torch.ones(3, 4), torch.ones(()), torch.zeros(3)
    ids = torch.arange(2, dtype=torch.int32)
    operator = Held("boltzmann_maxima", by_cuda, m3i.boltzmann_maxima.default, 80)
    operator(*rows, ids, torch.tensor(False))
    with pytest.raises(ValueError, match="m3i::boltzmann_maxima, result 0"):
        operator(*rows, ids, torch.tensor(True))
    assert operator.calls == 2


@pytest.mark.parametrize("rounded", [None, torch.bfloat16])
def test_what_an_operator_writes_to_is_held(rounded: torch.dtype | None) -> None:
    operator = held_operators(["boltzmann"], emulator.CUDA, 80)[m3i.boltzmann_rows_pass.default]
    ids = torch.tensor([2, -1, 8], dtype=torch.int32)
    half = None if rounded is None else torch.zeros(3, 16, dtype=rounded)
    products = torch.linspace(-1, 1, 48).view(3, 16)
    args = [products, None, 9, torch.tensor(2.0), None, None, None, ids, None, torch.empty(3)]
    operator(*args, torch.empty(3), half, True)
    assert float(products[0, :9].sum().abs()) < 1e-6 and float(products[0, 2]) < 0
    assert float(products[1, :9].abs().sum()) == 0
    with pytest.raises(ValueError, match="m3i::boltzmann_rows_pass, result 0"):
        wrong = Held("boltzmann_rows_pass", lambda *_: None, operator.by_cpu, 80)
        wrong(torch.ones(3, 16), *args[1:], torch.empty(3), None, True)
