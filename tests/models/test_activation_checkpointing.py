"""What each way of checkpointing keeps, repeats and returns: the same gradients, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from m3i_fast.config.fields import Recompute
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.models.internimage.model import InternImage
from m3i_fast.models.transformer.text_encoder import TextEncoder
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.planning.tensor_tracker import CAST_WEIGHTS, TensorTracker
from tests.shared.official_internimage import TINY_H, seeded_state

WAYS: tuple[Recompute, ...] = ("none", "selective", "full")
CFG = ViTConfig(
    image_size=32, patch_size=4, dim=64, depth=3, num_heads=2, layer_scale_init=0.1,
    drop_path_rate=0.5,
)  # fmt: skip


def vit(recompute: Recompute) -> nn.Module:
    return ViT(replace(CFG, activation_checkpointing=recompute))


def internimage(recompute: Recompute) -> nn.Module:
    cfg = replace(TINY_H, token_dim=64, drop_path_rate=0.5, activation_checkpointing=recompute)
    model = InternImage(cfg)
    model.load_state_dict(seeded_state(model))
    return model


def step(model: nn.Module, images: Tensor) -> int:
    """One forward and backward pass; bytes that the first left for the second, but for
    weights in another type.
    """
    torch.manual_seed(0)
    with TensorTracker() as tracker:
        tracker.book("held", (*model.parameters(), *model.buffers(), images))
        tracker.watch_casts(model.parameters())
        loss = model(images).square().sum()
        kept = tracker.total - tracker.bytes["held"] - tracker.bytes[CAST_WEIGHTS]
        loss.backward()
    return kept


@pytest.mark.parametrize("build", [vit, internimage])
@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_are_equal_and_less_is_kept(
    build: Callable[[Recompute], nn.Module], bf16: bool
) -> None:
    images = torch.randn(4, 3, 32, 32)
    kept, grads = [], []
    for way in WAYS:
        torch.manual_seed(1)
        model = build(way)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            kept.append(step(model, images))
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, *others in zip(*grads, strict=True):
        assert plain is not None
        assert all(torch.equal(plain, other) for other in others)
    assert kept[0] * 0.9 > kept[1]
    assert kept[1] * 0.5 > kept[2]


@pytest.mark.parametrize("build", [vit, internimage])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_is_called_again_in_a_step(
    build: Callable[[Recompute], nn.Module], bf16: bool
) -> None:
    """As for global and local views: autocast keeps the first call's casts for the second."""
    views, grads = torch.randn(2, 4, 3, 32, 32), {}
    for way in WAYS:
        torch.manual_seed(1)
        model = build(way)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            first, second = (model(view).square().sum() for view in views)
        (first + second).backward()
        grads[way] = [parameter.grad for parameter in model.parameters()]
    for plain, selective, full in zip(*grads.values(), strict=True):
        assert plain is not None and selective is not None and torch.equal(plain, full)
        if bf16:  # selective alone adds the gradients of both calls up in fp32
            assert (plain - selective).norm() < 2**-7 * plain.norm()
        else:
            assert torch.equal(plain, selective)


def test_a_text_encoder_repeats_its_padded_attention() -> None:
    ids, grads = torch.randint(0, 50, (4, 7)), []
    for way in WAYS:
        torch.manual_seed(1)
        cfg = TextConfig(vocab_size=50, context_length=7, dim=32, depth=2, num_heads=2)
        model = TextEncoder(replace(cfg, activation_checkpointing=way))
        model(ids, torch.tensor([7, 3, 1, 0])).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, *others in zip(*grads, strict=True):
        assert plain is not None
        assert all(torch.equal(plain, other) for other in others)


def test_selective_repeats_no_product() -> None:
    images = torch.randn(2, 3, 32, 32)
    flops = {}
    for way in WAYS:
        with FlopCounterMode(display=False) as counter:
            step(vit(way), images)
        flops[way] = counter.get_total_flops()
    assert flops["selective"] == flops["none"] < 0.8 * flops["full"]


def test_outputs_without_gradients_keep_nothing() -> None:
    model, images = vit("selective").eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad(), TensorTracker() as tracker:
        tracker.book("held", (*model.parameters(), *model.buffers(), images))
        output = model(images)
        assert tracker.total - tracker.bytes["held"] == output.untyped_storage().nbytes()


@pytest.mark.parametrize("way", ["selective", "full"])
def test_compiled_blocks_keep_as_little(way: Recompute) -> None:
    """aot_eager's partitioner keeps what the policy says, inside the compiled block."""
    images, kept, grads = torch.randn(2, 3, 32, 32), [], []
    for recompute in ("none", way):
        torch.manual_seed(1)
        model = ViT(replace(CFG, drop_path_rate=0.0, activation_checkpointing=recompute))
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        kept.append(saved_bytes(model, images))
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*grads)
    assert kept[1] < 0.8 * kept[0]


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Of all storages that autograd saves but the parameters', by its own hooks."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images).square().sum()
    loss.backward()
    return sum(sizes.values())


def test_another_way_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match="activation_checkpointing: expected 'none' or .*, got True"
    ):
        replace(CFG, activation_checkpointing=True)
