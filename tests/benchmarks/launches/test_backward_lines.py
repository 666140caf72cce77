"""The line of the forward pass that a backward pass is of, for each node of autograd."""

from __future__ import annotations

from pathlib import Path

import torch

from m3i_fast.benchmarks.launches.backward_lines import marked_backward

ROOT = Path(__file__).resolve().parent
HERE = Path(__file__).read_text().splitlines()


def line_of(statement: str) -> str:
    numbers = [n for n, text in enumerate(HERE, 1) if text.strip() == statement]
    return f"backward of {__file__}:{numbers[0]}"


def test_each_node_is_marked_by_its_line_before_it_runs() -> None:
    marks: list[str] = []
    weight = torch.ones(3, requires_grad=True)
    with marked_backward(lambda text: marks.append(text.decode()), ROOT):
        doubled = weight * 2
        loss = doubled.exp().sum()
        loss.backward()
    exp, product = line_of("loss = doubled.exp().sum()"), line_of("doubled = weight * 2")
    assert marks == [exp, exp, product, product]  # the last adds up the gradient
    assert weight.grad is not None and torch.equal(weight.grad, 2 * torch.full((3,), 2.0).exp())


def test_nothing_is_marked_afterwards_nor_elsewhere(tmp_path: Path) -> None:
    marks: list[bytes] = []
    weight = torch.ones(3, requires_grad=True)
    with marked_backward(marks.append, tmp_path):
        (weight * 2).sum().backward()
    assert set(marks) == {b"backward of ?"}
    del marks[:]
    (weight * 2).sum().backward()
    assert marks == [] and not torch.is_anomaly_enabled()
