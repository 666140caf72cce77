"""What boltzmann does with input that is not as it should be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from m3i_fast.ops import boltzmann, boltzmann_autograd, library
from tests.ops.boltzmann.cases import FP32, Case, leaves, make


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["z_hat", "z", "scale"])
@pytest.mark.parametrize("kind", ["diagonal", "ids", "sigmoid"])
def test_not_finite_is_nan(kind: str, where: str, value: float, kernel: str) -> None:
    call = make(Case(kind, 9, 9, 4))
    call.tensors[where].view(-1)[0] = value
    assert call.run(boltzmann, FP32)["value"].isnan()


def test_rows_of_zeros() -> None:
    call = make(Case("diagonal", 9, 9, 4))
    call.tensors["z_hat"][:] = 0
    assert float(call.run(boltzmann, FP32)["value"]) == pytest.approx(torch.tensor(9.0).log())


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_nothing_to_compare(rows: int, form: str) -> None:
    z_hat, z = torch.randn(rows, 4, requires_grad=True), torch.randn(0, 4, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    value = boltzmann(z_hat, z, scale, row_ids=torch.arange(rows), col_ids=torch.arange(0),
                      form=form)  # fmt: skip
    assert value.item() == 0
    assert all(float(g.abs().sum()) == 0 for g in torch.autograd.grad(value, (z_hat, z, scale)))


def test_nothing_annotated_is_0_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    boltzmann_autograd._warned.clear()
    z_hat, z, scale = leaves(Case("diagonal", 9, 9, 4))
    for _ in range(2):
        value = boltzmann(z_hat, z, scale, targets=torch.full((9,), -1))
    assert value.item() == 0
    assert all(float(g.abs().sum()) == 0 for g in torch.autograd.grad(value, (z_hat, z, scale)))
    assert len([record for record in caplog.records if "positive" in record.message]) == 1


def test_strided_features_are_copied_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_copied", set())
    call = make(Case("diagonal", 17, 17, 8), FP32)
    expected = call.run(boltzmann, FP32)
    for name in ("z_hat", "z"):
        call.tensors[name] = call.tensors[name].T.contiguous().T
    for _ in range(2):
        got = call.run(boltzmann, FP32)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])
    assert [record.args for record in caplog.records] == [
        ("boltzmann", "z_hat"),
        ("boltzmann", "z"),
    ]


def features(n: int = 3, m: int = 3, d: int = 4, **options: Any) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d, **options), torch.randn(m, d, **options)


ONE = torch.tensor(1.0)
WRONG: dict[str, tuple[Callable[[], Tensor], str]] = {
    "rows": (lambda: boltzmann(*features(3, 2), ONE), r"z: expected \[3\] rows .* got \[2\]"),
    "width": (
        lambda: boltzmann(torch.randn(3, 4), torch.randn(3, 5), ONE),
        r"z: expected shape \[3, 4\], got \[3, 5\]",
    ),
    "rank": (lambda: boltzmann(torch.randn(3), torch.randn(3), ONE), r"z_hat: expected shape"),
    "dtype": (
        lambda: boltzmann(torch.randn(3, 4), torch.randn(3, 4).double(), ONE),
        "z: expected dtype torch.float32 .* got torch.float64",
    ),
    "integers": (lambda: boltzmann(*(f.long() for f in features()), ONE), "z_hat: expected dtype"),
    "scale": (lambda: boltzmann(*features(), torch.ones(3)), r"scale: expected shape \[\]"),
    "bias": (
        lambda: boltzmann(*features(), ONE, bias=torch.ones(2)),
        r"bias: expected shape \[3\], got \[2\]",
    ),
    "one of two ids": (
        lambda: boltzmann(*features(), ONE, row_ids=torch.arange(3)),
        "row_ids, col_ids: expected both or neither",
    ),
    "both": (
        lambda: boltzmann(*features(), ONE, targets=torch.arange(3), row_ids=torch.arange(3)),
        "targets: expected either",
    ),
    "length of ids": (
        lambda: boltzmann(*features(), ONE, row_ids=torch.arange(3), col_ids=torch.arange(2)),
        r"col_ids: expected shape \[3\], got \[2\]",
    ),
    "dtype of targets": (
        lambda: boltzmann(*features(), ONE, targets=torch.ones(3)),
        "targets: expected dtype int64 or int32, got torch.float32",
    ),
    "form": (lambda: boltzmann(*features(), ONE, form="soft"), "form: expected"),  # type: ignore[arg-type]
    "reduction": (
        lambda: boltzmann(*features(), ONE, reduction="none"),  # type: ignore[arg-type]
        "reduction: expected",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# What 32 bits hold, and what they would take for class 0, for class 1, for -1 and for -2^31.
OUT_OF_RANGE = [3, -2, -5, 2**31 - 1, 2**40, -(2**32) + 1, 2**32 - 1, 2**63 - 1, -(2**63), 2**31]


@pytest.mark.parametrize("wrong", OUT_OF_RANGE)
@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_classes_out_of_range(form: Any, wrong: int) -> None:
    targets = torch.tensor([0, wrong, 1])
    with pytest.raises(RuntimeError, match=f"from 0 to 2, or -1 to ignore, got {wrong} in place 1"):
        boltzmann(*features(), ONE, targets=targets, form=form)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("wrong", OUT_OF_RANGE)
def test_classes_out_of_range_are_refused_by_the_kernel(wrong: int) -> None:
    """As from a compiled function and on a GPU, where nobody reads the targets first."""
    torch._dynamo.reset()
    compiled = torch.compile(boltzmann, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match=r"targets: expected rows of z|__trap"):
        compiled(*features(), ONE, targets=torch.tensor([0, wrong, 1]))


@pytest.mark.parametrize("ids", [(2**40, -5, 7), (2**32, 0, -(2**40))])
def test_ids_are_told_apart_by_all_their_bits(ids: tuple[int, ...]) -> None:
    """Any number but -1 is an id."""
    call, rows, place = features(), torch.tensor(ids), torch.arange(3)
    expected = boltzmann(*call, ONE, row_ids=place, col_ids=place)
    assert torch.equal(boltzmann(*call, ONE, row_ids=rows, col_ids=rows), expected)
