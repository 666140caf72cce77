"""The attentive probe against torch's own modules, step by step, and what it chooses."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import top_k_accuracy_score
from torch import Tensor, nn

from m3i_fast.evaluation.batches import LabelledBatch
from m3i_fast.evaluation.probes.attentive import (
    AttentiveProbes,
    _Training,
    attentive_probe,
)

CPU = torch.device("cpu")
DIM, HEADS, CLASSES = 24, 3, 5


class PlainProbe(nn.Module):
    """V-JEPA's pooler with one query and one block, of torch's modules, and a linear layer."""

    def __init__(self, probes: AttentiveProbes, r: int) -> None:
        super().__init__()
        dim, classes = probes.dim, probes.head_bias.shape[1]
        self.query = nn.Parameter(torch.empty(1, dim))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, probes.num_heads, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.head = nn.Linear(dim, classes)
        with torch.no_grad():
            for name, own in self.parameters_by_name(probes).items():
                own.copy_(getattr(probes, name)[r])

    def parameters_by_name(self, probes: AttentiveProbes) -> dict[str, Tensor]:
        """The probe's name of each of this module's parameters."""
        found: dict[str, Tensor] = {}
        for name, own in self.named_parameters():
            ours = name.removeprefix("attention.").replace(".", "_")
            found[ours] = own
        assert found.keys() == dict(probes.named_parameters()).keys()
        return found

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        query = self.query.expand(len(tokens), 1, -1)
        z = query + self.attention(query, normed, normed, need_weights=False)[0]
        z = z + self.fc2(F.gelu(self.fc1(self.norm2(z))))
        return self.head(z[:, 0])


def _probes(num: int) -> AttentiveProbes:
    """Probes that differ, with no parameter at its start."""
    probes = AttentiveProbes(num, DIM, CLASSES, num_heads=HEADS, seed=0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in probes.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.3)
    return probes


def test_logits_and_gradients_are_those_of_torchs_multihead_attention() -> None:
    probes, tokens = _probes(3), 2 * torch.randn(4, 11, DIM) + 1
    label = torch.tensor([0, 4, 2, 2])
    logits = probes(tokens)
    F.cross_entropy(logits.flatten(0, 1), label.repeat(3), reduction="sum").backward()
    for r in range(3):
        plain = PlainProbe(probes, r)
        expected = plain(tokens)
        torch.testing.assert_close(logits[r], expected, atol=2e-5, rtol=1e-5)
        F.cross_entropy(expected, label, reduction="sum").backward()
        for name, parameter in plain.parameters_by_name(probes).items():
            got = getattr(probes, name).grad[r]
            torch.testing.assert_close(got, parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


def _tokens(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """The class stands in one token at a random place, louder than no other."""
    rng = torch.Generator().manual_seed(seed)
    label = torch.randint(0, CLASSES, (num,), generator=rng)
    tokens = torch.randn(num, 12, DIM, generator=rng)
    tokens[..., :6] = 0
    place = torch.randint(0, 12, (num,), generator=rng)
    tokens[torch.arange(num), place, label] = 5.0
    tokens[torch.arange(num), place, 5] = 5.0
    return tokens, label


def _batches(num: int, seed: int, size: int = 64) -> Any:
    tokens, label = _tokens(num, seed)

    def epoch_of(epoch: int) -> list[LabelledBatch]:
        order = torch.randperm(num, generator=torch.Generator().manual_seed(epoch)).split(size)
        return [(tokens[rows], label[rows]) for rows in order]

    return epoch_of


def test_steps_are_those_of_each_rate_alone() -> None:
    rates, num_steps = (1e-3, 1e-2), 12
    start = _probes(2)
    training = _Training(copy.deepcopy(start), rates, num_steps)
    batches = _batches(256, 0)
    steps = [batches(step // 4)[step % 4] for step in range(num_steps)]
    losses = torch.stack([training.step(tokens, label) for tokens, label in steps], 1)
    ask = _tokens(32, 9)[0]
    most_clipped = 0.0
    for r, rate in enumerate(rates):
        plain = PlainProbe(start, r)
        groups = [
            {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": 1e-3},
            {"params": [p for p in plain.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=rate)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        expected = []
        for tokens, label in steps:
            loss = F.cross_entropy(plain(tokens), label)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            most_clipped = max(most_clipped, float(norm))
            optimizer.step()
            scheduler.step()
            expected.append(float(loss.detach()))
        assert losses[r].tolist() == pytest.approx(expected, abs=2e-5)
        torch.testing.assert_close(training.probes(ask)[r], plain(ask), atol=1e-4, rtol=1e-4)
    assert most_clipped > 3 and float((losses[0] - losses[1]).abs().max()) > 0.05
    for group in training.optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] == 1e-3) for p in group["params"])


def _probe(**options: Any) -> Any:
    given = {"num_classes": CLASSES, "num_steps": 120, "seed": 0, "device": CPU, **options}
    return attentive_probe(
        lambda tokens: tokens, _batches(512, 0), _batches(128, 1), _batches(200, 2), **given
    )


def test_it_finds_the_token_that_has_the_class_and_chooses_the_rate_by_other_pictures() -> None:
    found = _probe(learning_rates=(1e-6, 1e-2), num_heads=HEADS)
    assert found.chosen == 1 == found.choice_top1.argmax()
    assert found.chosen_top1 > 0.95 and found.top1[0] < 0.5
    assert found.loss.shape == (2, 120) and found.loss[1, -10:].mean() < 0.2
    for k, got in ((1, found.top1[1]), (5, found.top5[1])):
        with np.errstate(all="ignore"):
            oracle = (found.logits.argsort(1)[:, -k:] == found.label[:, None]).any(1).mean()
        assert got == pytest.approx(oracle)
    assert found.top1[1] == pytest.approx(top_k_accuracy_score(found.label, found.logits, k=1))


def test_a_seed_gives_the_same_bits_and_no_generator_moves() -> None:
    before = torch.random.get_rng_state()
    first, second = (_probe(num_steps=5) for _ in range(2))
    assert np.array_equal(first.logits, second.logits)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not np.array_equal(first.logits, _probe(num_steps=5, seed=1).logits)


def test_the_encoder_gets_no_gradient() -> None:
    weight = nn.Parameter(torch.ones(()))
    attentive_probe(
        lambda tokens: tokens * weight,
        *(_batches(64, s) for s in range(3)),
        num_classes=CLASSES,
        num_steps=2,
        seed=0,
        device=CPU,
    )
    assert weight.grad is None


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"labels: expected 0 to 2 \(num_classes = 3"):
        _probe(num_classes=3)
    with pytest.raises(ValueError, match="num_steps: expected one or more"):
        _probe(num_steps=0)
    with pytest.raises(ValueError, match=r"num_heads: expected a divisor of 24 \(dim\), got 5"):
        _probe(num_heads=5)
    with pytest.raises(ValueError, match="learning_rates"):
        _probe(learning_rates=())


def test_evaluation_labels_are_checked_before_the_training() -> None:
    encoded: list[int] = []

    def encode(tokens: Tensor) -> Tensor:
        encoded.append(len(tokens))
        return tokens

    tokens, label = _tokens(40, 3)
    for choice, validation in ((label + 9, label), (label, label + 9)):
        with pytest.raises(ValueError, match=r"labels: expected 0 to 4 .* or -1 for none"):
            attentive_probe(
                encode,
                _batches(64, 0),
                lambda epoch, choice=choice: [(tokens, choice)],
                lambda epoch, validation=validation: [(tokens, validation)],
                num_classes=CLASSES,
                num_steps=2,
                seed=0,
                device=CPU,
            )
    assert encoded == []


def test_pictures_without_a_label_are_left_out_of_the_figures() -> None:
    tokens, label = _tokens(100, 2)
    some = label.clone()
    some[::3] = -1

    def probe(*batches: LabelledBatch) -> Any:
        return attentive_probe(
            lambda tokens: tokens, _batches(512, 0), _batches(128, 1), lambda epoch: [*batches],
            num_classes=CLASSES, num_steps=20, seed=0, device=CPU,
        )  # fmt: skip

    has = some >= 0
    left_out = probe((tokens[:40], some[:40]), (tokens[40:], some[40:]))
    alone = probe((tokens[has], label[has]))
    assert left_out.label.tolist() == alone.label.tolist() == label[has].tolist()
    assert left_out.top1.tolist() == alone.top1.tolist()
    np.testing.assert_allclose(left_out.logits, alone.logits, atol=1e-5)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_does() -> None:
    options = {"num_steps": 20, "learning_rates": (1e-3,)}
    cpu, gpu = _probe(**options), _probe(**options, device=torch.device("cuda"))
    np.testing.assert_allclose(gpu.loss, cpu.loss, atol=1e-3)
