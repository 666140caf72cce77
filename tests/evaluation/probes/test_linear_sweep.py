"""The sweep against plain loops of torch and against scikit-learn; what it reads and chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from torch import nn

from m3i_fast.evaluation.feature_rows import ROWS_A_SLICE, Joined
from m3i_fast.evaluation.probes.linear_sweep import (
    INIT_STD,
    LEARNING_RATES,
    LinearSweep,
    _fit,
    epoch_batches,
    linear_sweep,
)

CPU = torch.device("cpu")
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def _clouds(
    num: int, *, classes: int = 4, dim: int = 6, spread: float, seed: int = 0
) -> tuple[Floats, Ints]:
    """Normal clouds about points on a sphere of radius 3."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((classes, dim))
    centres *= 3 / np.linalg.norm(centres, axis=1, keepdims=True)
    label = rng.integers(0, classes, num)
    rows = centres[label] + spread * rng.standard_normal((num, dim))
    return rows.astype(np.float32), label


def _sweep(train: tuple[Any, Ints], val: tuple[Any, Ints], **options: Any) -> LinearSweep:
    given = {"epochs": 20, "batch_size": 64, "seed": 3, "device": CPU, **options}
    inputs = {"mean_1": (train[0], val[0])}
    return linear_sweep(inputs, train[1], val[1], **given)


def _plain_loop(
    rows: Floats, label: Ints, fit: Ints, start: torch.Tensor, rate: float, **options: int
) -> nn.Linear:
    """One classifier, as DINOv2's code trains it."""
    linear = nn.Linear(rows.shape[1], len(start))
    with torch.no_grad():
        linear.weight.copy_(start)
        linear.bias.zero_()
    epochs, seed, size = options["epochs"], options["seed"], options["batch_size"]
    order = [
        batch
        for e in range(epochs)
        for batch in epoch_batches(fit, batch_size=size, seed=seed, epoch=e)
    ]
    optimizer = torch.optim.SGD(linear.parameters(), lr=rate, momentum=0.9, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(order), eta_min=0)
    for batch in order:
        logits = linear(torch.from_numpy(rows[batch]))
        loss = nn.CrossEntropyLoss()(logits, torch.from_numpy(label[batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return linear


def test_every_classifier_equals_a_plain_loop_on_the_same_batches() -> None:
    rows, label = _clouds(330, spread=1.0)
    wide = np.concatenate([rows, rows[:, ::-1] ** 2], axis=1)
    inputs = {"mean_1": rows, "wide": Joined(rows, rows[:, ::-1] ** 2)}
    rates = [0.001, 0.02, 0.3]
    fit = np.flatnonzero(np.arange(330) % 10 != 0)
    options = {"epochs": 4, "batch_size": 32, "seed": 5}
    sweeps = _fit(inputs, label, fit, rates, 4, *options.values(), CPU)
    generator = torch.Generator().manual_seed(5)
    for name, features in (("mean_1", rows), ("wide", wide)):
        start = torch.empty(4, features.shape[1]).normal_(std=INIT_STD, generator=generator)
        weight, bias = sweeps[name]
        for r, rate in enumerate(rates):
            plain = _plain_loop(features, label, fit, start, rate, **options)
            torch.testing.assert_close(weight[r], plain.weight, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(bias[r], plain.bias, atol=1e-6, rtol=1e-5)
        assert float((weight[0] - weight[2]).abs().max()) > 0.05


@pytest.mark.parametrize(("spread", "least", "most"), [(0.3, 1.0, 1.0), (2.0, 0.55, 0.9)])
def test_at_convergence_it_is_scikit_learns_logistic_regression(
    spread: float, least: float, most: float
) -> None:
    train, val = _clouds(2000, spread=spread), _clouds(2000, spread=spread, seed=1)
    found = _sweep(train, val, learning_rates=(0.1, 0.4), epochs=40)
    fit = found.fit_rows
    oracle = LogisticRegression(C=1e6, tol=1e-8, max_iter=1000).fit(train[0][fit], train[1][fit])
    expected = oracle.score(*val)
    assert least <= expected <= most
    assert found.chosen_top1 == pytest.approx(expected, abs=0.005)
    agree = (found.logits.argmax(1) == oracle.predict(val[0])).mean()
    assert agree > 0.98


def test_accuracies_are_scikit_learns_of_the_logits() -> None:
    train = _clouds(600, classes=9, spread=2.0)
    val = _clouds(ROWS_A_SLICE + 77, classes=9, spread=2.0, seed=1)
    val[1][::3] = -1
    found = _sweep(train, val, epochs=3)
    assert found.logits.shape == (len(val[1]), 9)
    expected = val[0] @ found.weight.T + found.bias
    np.testing.assert_allclose(found.logits, expected, atol=1e-5)
    has = val[1] >= 0
    for k, got in ((1, found.chosen_top1), (5, found.chosen_top5)):
        score = top_k_accuracy_score(val[1][has], found.logits[has], k=k, labels=range(9))
        assert got == pytest.approx(score, abs=1e-12)
    assert 0 < found.chosen_top1 < found.chosen_top5 < 1
    assert found.best_on_validation == found.top1.max() >= found.chosen_top1


def test_the_choice_sees_no_validation_label_and_no_row_that_was_fitted() -> None:
    train, val = _clouds(500, spread=2.0), _clouds(300, spread=2.0, seed=1)
    train[1][::7] = -1
    found = _sweep(train, val)
    turned = _sweep(train, (val[0], val[1][::-1].copy()))
    assert found.chosen == turned.chosen and np.array_equal(found.logits, turned.logits)
    assert not np.allclose(found.top1, turned.top1)
    labelled = np.flatnonzero(train[1] >= 0)
    assert np.array_equal(np.sort(np.r_[found.fit_rows, found.choice_rows]), labelled)
    assert len(found.choice_rows) == round(0.1 * len(labelled))
    assert found.choice_top1.argmax() == np.ravel_multi_index(found.chosen, (1, 13))
    assert found.learning_rates == LEARNING_RATES
    # What the left out rows are labelled as moves the choice alone.
    other = train[1].copy()
    other[found.choice_rows] = (other[found.choice_rows] + 1) % 4
    moved = _sweep((train[0], other), val)
    assert np.array_equal(moved.top1, found.top1)
    assert not np.array_equal(moved.choice_top1, found.choice_top1)
    chosen_rows = train[0][found.choice_rows] @ found.weight.T + found.bias
    share = (chosen_rows.argmax(1) == train[1][found.choice_rows]).mean()
    assert found.choice_top1[found.chosen] == pytest.approx(share)


def test_pictures_of_one_thing_are_left_out_together() -> None:
    train, val = _clouds(400, spread=1.0), _clouds(50, spread=1.0, seed=1)
    group = np.arange(400) // 8
    found = _sweep(train, val, train_group=group, choice_share=0.3)
    assert set(group[found.fit_rows]).isdisjoint(group[found.choice_rows])
    assert len(found.choice_rows) == 0.3 * 400


def test_a_seed_gives_the_same_bits_and_no_generator_moves() -> None:
    train, val = _clouds(300, spread=1.5), _clouds(100, spread=1.5, seed=1)
    torch.manual_seed(1)
    np.random.seed(1)
    first = _sweep(train, val)
    drawn = (float(torch.rand(())), np.random.rand())
    torch.manual_seed(1)
    np.random.seed(1)
    assert drawn == (float(torch.rand(())), np.random.rand())
    second, third = _sweep(train, val), _sweep(train, val, seed=4)
    assert np.array_equal(first.logits, second.logits) and first.chosen == second.chosen
    assert not np.array_equal(first.fit_rows, third.fit_rows)


def test_a_rate_that_diverges_scores_nothing_and_is_not_chosen() -> None:
    train, val = _clouds(300, spread=0.3), _clouds(100, spread=0.3, seed=1)
    # Of weights of 1e38 the products are infinite.
    found = _sweep(train, val, learning_rates=(1e39, 0.5))
    assert found.top1[0, 0] == found.top5[0, 0] == found.choice_top1[0, 0] == 0
    assert found.chosen == (0, 1) and found.chosen_top1 == 1


class _OnlyByBatches:
    """Rows in a file that may not be read whole; remembers the most rows and memory there was."""

    def __init__(self, path: Path) -> None:
        self.rows = np.load(path, mmap_mode="r")
        self.shape = self.rows.shape
        self.most_rows = self.most_kib = 0

    def __getitem__(self, index: Any) -> Floats:
        self.most_kib = max(self.most_kib, _private_kib())
        taken = self.rows[index]
        self.most_rows = max(self.most_rows, len(taken))
        return taken  # type: ignore[no-any-return]

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the rows were asked for as a whole")


def _private_kib() -> int:
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def test_a_hundred_thousand_rows_take_the_memory_of_a_batch(tmp_path: Path) -> None:
    path, (num, dim) = tmp_path / "mean_1.npy", (100_000, 384)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num, dim))
    rng = np.random.default_rng(0)
    label = rng.integers(0, 10, num)
    for part in range(0, num, 10_000):
        file[part : part + 10_000] = rng.standard_normal((10_000, dim), dtype=np.float32)
        file[np.arange(part, part + 10_000), label[part : part + 10_000]] += 4
    del file
    warm = _clouds(300, classes=10, dim=dim, spread=1.0)  # what libraries allocate at first
    _sweep(warm, warm, learning_rates=(0.01, 0.1), epochs=1, batch_size=1024)
    rows = _OnlyByBatches(path)
    before = _private_kib()
    found = _sweep(
        (rows, label), (rows, label), learning_rates=(0.01, 0.1), epochs=1, batch_size=1024
    )
    assert rows.most_rows == 1024
    # The whole is 150,000 KiB. Logits are 3,906, orders and split of rows 8 bytes each.
    assert rows.most_kib - before < 24_000
    assert found.chosen_top1 > 0.95


def test_what_does_not_fit_is_refused() -> None:
    train, val = _clouds(50, spread=1.0), _clouds(20, spread=1.0)
    none = np.full(20, -1)
    with pytest.raises(
        ValueError, match=r"inputs\['mean_1'\]: expected .* \(49, 6\) and \(20, 6\)"
    ):
        _sweep((train[0], train[1][:49]), val)
    with pytest.raises(ValueError, match="val_label: expected a labelled row"):
        _sweep(train, (val[0], none))
    with pytest.raises(ValueError, match="train_label: expected two labelled rows"):
        _sweep((val[0], none), val)
    with pytest.raises(ValueError, match=r"got 50 labelled rows of 1 groups"):
        _sweep(train, val, train_group=np.zeros(50, dtype=np.int64))
    with pytest.raises(ValueError, match="learning_rates: expected one or more, all above 0"):
        _sweep(train, val, learning_rates=(0.1, 0.0))
    with pytest.raises(ValueError, match="choice_share"):
        _sweep(train, val, choice_share=1.0)
    with pytest.raises(ValueError, match="inputs: expected one or more"):
        linear_sweep({}, train[1], val[1], epochs=1, seed=0, device=CPU)
    train[0][5, 2] = np.nan
    with pytest.raises(ValueError, match="mean_1: expected finite features"):
        _sweep(train, val)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_does() -> None:
    train, val = _clouds(600, spread=1.5), _clouds(200, spread=1.5, seed=1)
    rates = (0.01, 0.1)
    cpu = _sweep(train, val, learning_rates=rates)
    gpu = _sweep(train, val, learning_rates=rates, device=torch.device("cuda"))
    np.testing.assert_allclose(gpu.top1, cpu.top1, atol=0.01)
    np.testing.assert_allclose(gpu.weight, cpu.weight, atol=1e-3)
