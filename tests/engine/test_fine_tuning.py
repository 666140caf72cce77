"""Fine-tuning against a loop of timm's and torch's own parts; every kind of encoder learns."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from m3i_fast.config.fine_tuning import FineTuningConfig
from m3i_fast.config.models.vit import vit_demo
from m3i_fast.engine.fine_tuning import Classifier, FineTuned, fine_tune
from m3i_fast.engine.optim.optimizers import build_optimizer
from m3i_fast.engine.teacher import Teacher, TimmEncoder
from m3i_fast.evaluation.batches import LabelledBatch
from m3i_fast.models.encoder import ImageEncoder
from m3i_fast.models.internimage.model import InternImage
from m3i_fast.models.transformer.vit import ViT
from tests.shared.official_internimage import TINY_H

CPU = torch.device("cpu")
CLASSES = 3
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


def _timm(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 0, **options})


def _encoder(model: nn.Module) -> TimmEncoder:
    return TimmEncoder(model, num_prefix=model.num_prefix_tokens, dim=SMALL["embed_dim"])  # type: ignore[arg-type]


def _colours(num: int, size: int = 32, seed: int = 0) -> LabelledBatch:
    """Noise with a tint, which is the class."""
    rng = torch.Generator().manual_seed(seed)
    label = torch.randint(0, CLASSES, (num,), generator=rng)
    images = torch.randn(num, 3, size, size, generator=rng)
    images[torch.arange(num), label] += 1.0
    return images, label


def _fine_tune(encoder: ImageEncoder, cfg: FineTuningConfig, **options: Any) -> FineTuned:
    size = options.pop("size", 32)
    data = options.pop("data", None) or [_colours(16, size, seed) for seed in range(4)]
    given = {"num_classes": CLASSES, "steps_per_epoch": 4, "batch_size": 16, "seed": 0}
    given = {**given, "device": CPU, **options}
    return fine_tune(
        encoder, lambda epoch: data, lambda epoch: [_colours(48, size, 99)], cfg=cfg, **given
    )


@pytest.mark.parametrize(
    "options", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}]
)
def test_layer_scales_and_decays_are_timms(options: dict[str, Any]) -> None:
    theirs = _timm(**options, num_classes=CLASSES)
    names = {id(p): name for name, p in theirs.named_parameters()}
    expected = {}
    no_decay = tuple(theirs.no_weight_decay()) + ("reg_token",)  # type: ignore[operator]
    for group in param_groups_layer_decay(
        theirs, weight_decay=0.05, layer_decay=0.7, no_weight_decay_list=no_decay
    ):
        for parameter in group["params"]:
            expected[names[id(parameter)]] = (group["lr_scale"], group["weight_decay"])
    classifier = Classifier(_encoder(_timm(**options)), CLASSES, seed=0)
    optimizer = build_optimizer(FineTuningConfig(layer_decay=0.7).optim(256), classifier)
    own = {id(p): name for name, p in classifier.named_parameters()}
    found = {
        own[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    of_encoder = dict(classifier.encoder.model.named_parameters())  # type: ignore[union-attr]
    for name in of_encoder:
        assert found[f"encoder.model.{name}"] == pytest.approx(expected[name]), name
    assert len(of_encoder) > 12 * SMALL["depth"]
    assert found["encoder.model.blocks.0.attn.qkv.weight"][0] == pytest.approx(0.7**3)
    assert found["head.weight"] == expected["head.weight"] == (1.0, 0.05)


def test_training_equals_a_loop_of_timms_and_torchs_parts() -> None:
    cfg = FineTuningConfig(epochs=3, warmup_epochs=1, base_lr=0.02, layer_decay=0.7)
    model = _timm()
    data = [_colours(16, seed=seed) for seed in range(4)]
    found = _fine_tune(_encoder(model), cfg, data=data)

    plain = Classifier(_encoder(copy.deepcopy(model)), CLASSES, seed=0).train()
    scales = {
        id(p): group["lr_scale"]
        for group in param_groups_layer_decay(
            plain.encoder.model,
            layer_decay=0.7,  # type: ignore[arg-type]
        )
        for p in group["params"]
    }
    tables = ("pos_embed", "cls_token")
    groups = []
    for name, p in plain.named_parameters():
        # Without a head timm counts from the last block on; with one that is a layer higher.
        scale = 0.7 * scales[id(p)] if id(p) in scales else 1.0
        decay = 0.0 if p.ndim <= 1 or name.endswith(tables) else 0.05
        groups.append({"params": [p], "scale": scale, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    losses, peak = [], 0.02 * 16 / 256
    for step in range(12):
        images, label = data[step % 4]
        rate = peak * (step + 1) / 4
        if step >= 4:
            rate = 1e-6 + (peak - 1e-6) * 0.5 * (1 + math.cos(math.pi * (step - 4) / 7))
        np.random.seed(np.random.SeedSequence((0, step)).generate_state(4))
        mixed, target = mixup(images.clone(), label)
        loss = SoftTargetCrossEntropy()(plain(mixed), target)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.step()
        losses.append(float(loss.detach()))
        assert found.learning_rate[step] == pytest.approx(rate, rel=1e-9)
    assert found.loss.tolist() == pytest.approx(losses, abs=1e-5)
    images, label = _colours(48, seed=99)
    with torch.no_grad():
        expected = plain.eval()(images)
    np.testing.assert_allclose(found.logits, expected.numpy(), atol=1e-3)
    assert found.top1 == pytest.approx(
        float((expected.argmax(1) == label).float().mean()), abs=0.02
    )
    assert found.top5 == 1.0


def test_without_mixing_the_loss_is_timms_label_smoothing_and_needs_no_timm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = FineTuningConfig(epochs=1, warmup_epochs=0, mixup=0, cutmix=0, label_smoothing=0.2)
    vit = ViT(vit_demo(image_size=32, depth=1))
    images, label = _colours(15)
    start = Classifier(copy.deepcopy(vit), CLASSES, seed=0)
    expected = LabelSmoothingCrossEntropy(0.2)(start(images), label)
    monkeypatch.setitem(sys.modules, "timm.data", None)
    found = _fine_tune(vit, cfg, data=[(images, label)], steps_per_epoch=1)
    assert found.loss[0] == pytest.approx(float(expected.detach()), abs=1e-6)
    with pytest.raises(ImportError, match=r'pip install "m3i-fast\[timm\]"'):
        _fine_tune(vit, FineTuningConfig())


def _vit() -> ViT:
    return ViT(vit_demo(image_size=32, depth=2, class_token=True, drop_path_rate=0.2))


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (_vit, 32),
        (lambda: _encoder(_timm(drop_path_rate=0.2)), 32),
        (lambda: InternImage(TINY_H), 64),
    ],
    ids=["vit", "timm", "internimage"],
)
def test_every_kind_of_encoder_learns_and_stays_as_it_was(make: Any, size: int) -> None:
    torch.manual_seed(0)
    encoder = make().requires_grad_(False).eval()
    before = copy.deepcopy(encoder.state_dict())
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    epochs, num = (4, 8) if size > 32 else (5, 16)  # the larger pictures take longer
    cfg = FineTuningConfig(epochs=epochs, warmup_epochs=1, base_lr=0.03, mixup=0.2, cutmix=0.0)
    data = [_colours(num, size, seed) for seed in range(4)]
    found = _fine_tune(encoder, cfg, size=size, data=data)
    assert found.top1 > 0.9
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    trained = found.classifier.encoder.state_dict()
    moved = [k for k, v in trained.items() if not torch.equal(v, before[k])]
    assert len(moved) > 0.9 * len(list(encoder.parameters()))


def test_a_seed_gives_the_same_bits() -> None:
    cfg = FineTuningConfig(epochs=1, warmup_epochs=0)
    vit = _vit()
    first, second, third = (_fine_tune(vit, cfg, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.logits, second.logits) and np.array_equal(first.loss, second.loss)
    assert not np.array_equal(first.loss, third.loss)


def test_bf16_is_near_fp32() -> None:
    cfg, vit = FineTuningConfig(epochs=1, warmup_epochs=0), _vit()
    wide, narrow = (_fine_tune(vit, cfg, dtype=d) for d in (torch.float32, torch.bfloat16))
    np.testing.assert_allclose(narrow.loss, wide.loss, atol=0.02)
    assert not np.array_equal(narrow.loss, wide.loss)
    assert all(p.dtype == torch.float32 for p in narrow.classifier.parameters())


def test_what_does_not_fit_is_refused() -> None:
    cfg, vit = FineTuningConfig(epochs=1, warmup_epochs=0), _vit()
    images, label = _colours(5)

    def tune(batch: LabelledBatch, encoder: ImageEncoder = vit) -> None:
        _fine_tune(encoder, cfg, data=[batch])

    with pytest.raises(ValueError, match=r"expected an even number of pictures.* got 5"):
        tune((images, label))
    with pytest.raises(ValueError, match=r"normalised pictures .* torch\.uint8"):
        tune((images[:4].to(torch.uint8), label[:4]))
    with pytest.raises(ValueError, match=r"labels: expected 0 to 2"):
        tune((images[:4], label[:4] + 1 + CLASSES))
    with pytest.raises(ValueError, match=r"optim\.layer_decay: .* no order"):
        tune((images[:4], label[:4]), Teacher(_vit()))
    for wrong in ({"epochs": 0}, {"warmup_epochs": 51}, {"label_smoothing": 1.0}, {"mixup": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FineTuningConfig(**wrong)  # type: ignore[arg-type]


def test_validation_labels_are_checked_before_the_training_and_pictures_without_one_left_out() -> (
    None
):
    cfg, vit = FineTuningConfig(epochs=1, warmup_epochs=0, mixup=0, cutmix=0), _vit()
    images, label = _colours(8)
    taken: list[int] = []

    def training(epoch: int) -> Iterator[LabelledBatch]:
        taken.append(epoch)
        yield images, label

    def tune(labels: Tensor) -> FineTuned:
        return fine_tune(
            vit, training, lambda epoch: [(images, labels)], cfg=cfg, num_classes=CLASSES,
            steps_per_epoch=1, batch_size=8, seed=0, device=CPU,
        )  # fmt: skip

    with pytest.raises(ValueError, match="labels: expected 0 to 2 .* or -1 for none, got 0 to 9"):
        tune(torch.tensor([0, 1, 2, 9, 0, 1, 2, 0]))
    assert taken == []
    some = label.clone()
    some[::2] = -1
    found = tune(some)
    assert found.label.tolist() == label[1::2].tolist() and found.logits.shape == (4, CLASSES)
    with pytest.raises(ValueError, match="validation: expected labelled pictures, got none"):
        tune(torch.full_like(label, -1))


def test_generators_of_other_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def seed_all(seed: int) -> None:
        raise AssertionError("the generators of all GPUs are seeded")

    monkeypatch.setattr("torch.cuda.manual_seed_all", seed_all)
    vit = _vit()
    before = torch.get_rng_state()
    _fine_tune(vit, FineTuningConfig(epochs=1, warmup_epochs=0, mixup=0, cutmix=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_defaults_are_maes_table() -> None:
    cfg = FineTuningConfig()
    optim = cfg.optim(1024)
    assert (optim.name, optim.lr, optim.betas, optim.weight_decay) == (
        "adamw",
        4e-3,
        (0.9, 0.999),
        0.05,
    )
    assert (optim.layer_decay, optim.warmup_fraction, optim.clip_grad_norm) == (0.75, 0.1, 0.0)
    assert (cfg.label_smoothing, cfg.mixup, cfg.cutmix) == (0.1, 0.8, 1.0)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_does() -> None:
    cfg = FineTuningConfig(epochs=1, warmup_epochs=0)
    vit = ViT(vit_demo(image_size=32, depth=2))
    cpu, gpu = (_fine_tune(vit, cfg, device=torch.device(d)) for d in ("cpu", "cuda"))
    np.testing.assert_allclose(gpu.loss, cpu.loss, atol=1e-3)
