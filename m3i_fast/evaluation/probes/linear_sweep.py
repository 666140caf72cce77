"""DINOv2's linear probe: a sweep over inputs and learning rates in one pass over the rows.

Protocol and settings are those of arXiv 2304.07193 and its published code (eval/linear.py): SGD
with momentum 0.9 and no weight decay, half a cosine to 0, every learning rate times batch_size /
256, weights from a normal of standard deviation 0.01, cross-entropy, classifiers on the last block
or the last four, class tokens with or without the mean of the last block's patches. Two things
differ. Rows are features that were computed once, so that pictures are not augmented; and the
classifier is chosen on training rows that no classifier was fitted to, where the published code
takes the one that is best on the validation set.

Legend: N training rows, M validation rows, B rows of a batch, C features, K classes, I inputs, R
learning rates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3i_fast.evaluation.feature_rows import Rows, slices, take
from m3i_fast.evaluation.probes.accuracy import top_k_hits
from m3i_fast.evaluation.probes.rate_sweep import expect_rates, set_gradients, slices_of

Labels = NDArray[np.int64]
Scores = NDArray[np.float64]

# Before they are multiplied by batch_size / 256.
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
BATCH_SIZE = 1024  # of DINOv2's eight GPUs together
NUM_STEPS = 12_500  # DINOv2's, of which an epoch of ImageNet has 1,251
MOMENTUM = 0.9
INIT_STD = 0.01
CHOICE_SHARE = 0.1  # of the labelled training rows


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSweep:
    """The accuracy of every classifier, and what the chosen one says of the validation rows."""

    inputs: tuple[str, ...]  # [I]
    learning_rates: tuple[float, ...]  # [R], before they were multiplied by batch_size / 256
    choice_top1: Scores  # [I, R], on the rows that the choice was made on
    top1: Scores  # [I, R], on the labelled validation rows
    top5: Scores  # [I, R]; 1 where K <= 5 and nothing diverged
    chosen: tuple[int, int]  # index into inputs and into learning_rates
    choice_rows: Labels  # training rows that the choice was made on, in ascending order
    fit_rows: Labels  # training rows that all classifiers were fitted to, in ascending order
    logits: NDArray[np.float32]  # [M, K] of the chosen one
    weight: NDArray[np.float32]  # [K, C] of the chosen one
    bias: NDArray[np.float32]  # [K]

    @property
    def chosen_input(self) -> str:
        """Return the name of the input of the chosen classifier."""
        return self.inputs[self.chosen[0]]

    @property
    def chosen_rate(self) -> float:
        """Return the learning rate of the chosen classifier."""
        return self.learning_rates[self.chosen[1]]

    @property
    def chosen_top1(self) -> float:
        """Return the chosen classifier's accuracy on the validation rows."""
        return float(self.top1[self.chosen])

    @property
    def chosen_top5(self) -> float:
        """Return how often the label is among the five likeliest classes of the chosen one."""
        return float(self.top5[self.chosen])

    @property
    def best_on_validation(self) -> float:
        """Return the highest accuracy on the validation rows, which DINOv2's code reports."""
        return float(self.top1.max())


@torch.no_grad()
def linear_sweep(
    inputs: Mapping[str, tuple[Rows, Rows]],  # name -> [N, C], [M, C]
    train_label: Labels,  # [N], -1 for none
    val_label: Labels,  # [M], -1 for none
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int | None = None,
    num_steps: int = NUM_STEPS,
    batch_size: int = BATCH_SIZE,
    seed: int,
    device: torch.device,
    train_group: Labels | None = None,  # [N]
    choice_share: float = CHOICE_SHARE,
) -> LinearSweep:
    """Fit a classifier for each input and learning rate, in fp32, and choose one of them.

    The choice is made on `choice_share` of the labelled training rows, which are left out of the
    fit: the highest accuracy there wins, of equal ones the first input's and of these the first
    rate. epochs: None for as many as come nearest to num_steps, DINOv2's. train_group: rows of one
    group, such as pictures of one thing, are left out together. Rows are read by batches and never
    whole: memory is that of the classifiers, of one batch, and of the logits [M, K]. One process
    computes all: of several ranks let the first one call this. The result depends on the arguments
    alone; on a GPU its last bits may differ.

    Raises ValueError where shapes do not fit, a feature is not finite, or fewer than two groups of
    training rows, or no validation row, have a label.
    """
    expect_rates(learning_rates)
    _expect_shapes(inputs, train_label, val_label)
    fit, choice = kept_out(train_label, train_group, choice_share, seed)
    if epochs is None:
        epochs = max(1, round(num_steps / steps_per_epoch(len(fit), batch_size)))
    num_classes = int(max(train_label.max(), val_label.max())) + 1
    sweeps = _fit(
        {name: train for name, (train, _) in inputs.items()},
        train_label,
        fit,
        [rate * batch_size / 256 for rate in learning_rates],
        num_classes,
        epochs,
        batch_size,
        seed,
        device,
    )
    labelled = np.flatnonzero(val_label >= 0)
    choice_top1, top1, top5 = (np.empty((len(inputs), len(learning_rates))) for _ in range(3))
    for i, (name, (train, val)) in enumerate(inputs.items()):
        choice_top1[i] = _scores(sweeps[name], name, train, train_label, choice, device)[0]
        top1[i], top5[i] = _scores(sweeps[name], name, val, val_label, labelled, device)
    best = np.unravel_index(int(choice_top1.argmax()), choice_top1.shape)
    chosen = (int(best[0]), int(best[1]))
    name = list(inputs)[chosen[0]]
    weight, bias = (each[chosen[1]].cpu() for each in sweeps[name])
    return LinearSweep(
        inputs=tuple(inputs),
        learning_rates=tuple(learning_rates),
        choice_top1=choice_top1,
        top1=top1,
        top5=top5,
        chosen=chosen,
        choice_rows=choice,
        fit_rows=fit,
        logits=_logits(weight, bias, name, inputs[name][1], device),
        weight=weight.numpy(),
        bias=bias.numpy(),
    )


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Count the batches of `epoch_batches`."""
    return max(1, num_rows // batch_size)


def epoch_batches(rows: Labels, *, batch_size: int, seed: int, epoch: int) -> Iterator[Labels]:
    """Yield batches of the rows in an order drawn by (seed, epoch), without the last part of one.

    Of fewer rows than `batch_size` all are one batch.
    """
    order = np.random.default_rng((seed, epoch)).permutation(rows)
    size = min(batch_size, len(order))
    for start in range(0, len(order) - size + 1, size):
        yield order[start : start + size]


Stacked = tuple[Tensor, Tensor]  # weight [R, K, C], bias [R, K]


def _fit(
    inputs: Mapping[str, Rows],  # [N, C]
    label: Labels,  # [N]
    rows: Labels,  # to fit
    rates: Sequence[float],
    num_classes: int,
    epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> dict[str, Stacked]:  # by input
    generator = torch.Generator().manual_seed(seed)
    sweeps: dict[str, Stacked] = {}
    for name, features in inputs.items():
        # Drawn for one learning rate, so that the rates of an input start alike.
        weight = torch.empty(num_classes, features.shape[1])
        weight = weight.normal_(std=INIT_STD, generator=generator).to(device)
        bias = torch.zeros(len(rates), num_classes, device=device)
        sweeps[name] = (weight.repeat(len(rates), 1, 1), bias)
    of_inputs = {name: slices_of(stacked) for name, stacked in sweeps.items()}
    groups = [
        {"params": parameters, "lr": rate}
        for each in of_inputs.values()
        for parameters, rate in zip(each, rates, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, lr=rates[0], momentum=MOMENTUM, weight_decay=0)
    num_steps = epochs * steps_per_epoch(len(rows), batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps, eta_min=0)
    for epoch in range(epochs):
        for batch in epoch_batches(rows, batch_size=batch_size, seed=seed, epoch=epoch):
            target = torch.from_numpy(label[batch]).to(device)
            for name, features in inputs.items():
                gradients = _gradients(sweeps[name], take(name, features, batch).to(device), target)
                set_gradients(of_inputs[name], gradients)
            optimizer.step()
            scheduler.step()
    return sweeps


def _gradients(stacked: Stacked, features: Tensor, target: Tensor) -> Stacked:  # [B, C], [B]
    """Return the gradients of each classifier's mean cross-entropy.

    In closed form, (softmax - one_hot) / B, which spares autograd's copies of all logits.
    """
    error = _classify(stacked, features).softmax(-1)  # [B, R, K]
    error[torch.arange(len(target), device=target.device), :, target] -= 1
    error /= len(target)
    weight = (error.flatten(1).T @ features).view_as(stacked[0])
    return weight, error.sum(0)


def _classify(stacked: Stacked, features: Tensor) -> Tensor:  # [B, C] -> [B, R, K]
    """Return the logits of all learning rates of an input, by one matrix product."""
    weight, bias = stacked
    return torch.addmm(bias.flatten(), features, weight.flatten(0, 1).T).view(-1, *bias.shape)


def _scores(
    stacked: Stacked, name: str, rows: Rows, label: Labels, asked: Labels, device: torch.device
) -> tuple[Scores, Scores]:  # [R] top 1, [R] top 5
    """Return the accuracy of all learning rates on the rows `asked`."""
    hits = torch.zeros(2, len(stacked[1]), dtype=torch.int64, device=device)
    for part in slices(len(asked)):
        index = asked[part]
        logits = _classify(stacked, take(name, rows, index).to(device)).transpose(0, 1)
        target = torch.from_numpy(label[index]).to(device)
        hits += torch.stack([top_k_hits(logits, target, k=k).sum(-1) for k in (1, 5)])
    top1, top5 = hits.cpu().numpy() / len(asked)
    return top1, top5


def _logits(
    weight: Tensor, bias: Tensor, name: str, rows: Rows, device: torch.device
) -> NDArray[np.float32]:  # [M, K]
    logits = np.empty((rows.shape[0], len(bias)), dtype=np.float32)
    weight, bias = weight.to(device), bias.to(device)
    for part in slices(len(logits)):
        features = take(name, rows, part).to(device)
        logits[part] = torch.addmm(bias, features, weight.T).cpu().numpy()
    return logits


def kept_out(
    label: Labels, group: Labels | None, share: float, seed: int
) -> tuple[Labels, Labels]:  # rows to fit, rows to choose on
    """Draw a share of the groups of labelled rows to choose on; ValueError for fewer than two."""
    if not 0 < share < 1:
        raise ValueError(f"choice_share: expected a share between 0 and 1, got {share}")
    labelled = np.flatnonzero(label >= 0)
    of_row = labelled if group is None else group[labelled]
    distinct, index = np.unique(of_row, return_inverse=True)
    if len(distinct) < 2:
        raise ValueError(
            "train_label: expected two labelled rows or more of different groups, one to fit and "
            f"one to choose on, got {len(labelled)} labelled rows of {len(distinct)} groups"
        )
    num_chosen = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    left_out = np.zeros(len(distinct), dtype=bool)
    left_out[np.random.default_rng(seed).permutation(len(distinct))[:num_chosen]] = True
    return labelled[~left_out[index]], labelled[left_out[index]]


def _expect_shapes(
    inputs: Mapping[str, tuple[Rows, Rows]], train_label: Labels, val_label: Labels
) -> None:
    if not inputs:
        raise ValueError("inputs: expected one or more, got none")
    for name, (train, val) in inputs.items():
        got = (tuple(train.shape), tuple(val.shape))
        width = train.shape[-1]
        expected = ((len(train_label), width), (len(val_label), width))
        if got != expected:
            raise ValueError(
                f"inputs[{name!r}]: expected training and validation rows of shapes "
                f"{expected[0]} and {expected[1]}, as the labels have them, got {got[0]} and "
                f"{got[1]}"
            )
    if not (val_label >= 0).any():
        raise ValueError("val_label: expected a labelled row, got none")
