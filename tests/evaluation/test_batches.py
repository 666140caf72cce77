"""Batches are repeated epoch by epoch, as many as there are steps."""

import pytest
import torch

from m3i_fast.evaluation.batches import LabelledBatch, cell_tokens, expect_labels, repeated


def _epoch(epoch: int) -> list[LabelledBatch]:
    return [(torch.full((1,), epoch), torch.full((1,), i)) for i in range(3)]


@pytest.mark.parametrize("num_steps", [0, 1, 3, 7])
def test_epochs_follow_each_other(num_steps: int) -> None:
    asked: list[int] = []

    def batches(epoch: int) -> list[LabelledBatch]:
        asked.append(epoch)
        return _epoch(epoch)

    got = [(int(e), int(i)) for e, i in repeated(batches, num_steps)]
    assert got == [(step // 3, step % 3) for step in range(num_steps)]
    assert asked == list(range(max(1, -(-num_steps // 3))))


def test_an_epoch_without_batches_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(ValueError, match="expected one or more in epoch 1, got none"):
        list(repeated(lambda epoch: _epoch(0) if epoch == 0 else [], 5))


def test_the_prefix_is_left_out() -> None:
    tokens = torch.randn(2, 6, 4)
    assert torch.equal(cell_tokens(lambda _: tokens, torch.empty(2, 3, 8, 8), 2), tokens[:, 2:])
    with pytest.raises(ValueError, match=r"more than 6 \(num_prefix\)"):
        cell_tokens(lambda _: tokens, torch.empty(2, 3, 8, 8), 6)


@pytest.mark.parametrize("label", [[0, 3], [-1, 2], []])
def test_labels_outside_the_classes_are_refused(label: list[int]) -> None:
    expect_labels(torch.tensor([0, 2]), 3)
    with pytest.raises(ValueError, match=r"labels: expected 0 to 2 \(num_classes = 3"):
        expect_labels(torch.tensor(label, dtype=torch.int64), 3)
