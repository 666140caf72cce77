"""Batches of several lengths in one pass against a pass each: values, gradients, operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.config.objective.heads import DecoderConfig
from m3i_fast.models.encoder import take_cells
from m3i_fast.models.transformer.blocks import Block
from m3i_fast.models.transformer.packing import Packed, Sequences, pack, unpack
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.objectives.heads import DenseDecoder, Question

CFG = ViTConfig(
    image_size=16, patch_size=4, dim=32, depth=2, num_heads=4, class_token=True, num_registers=2
)
SHAPES = (3, 7), (5, 4), (1, 1)


class Products(TorchDispatchMode):
    """Count products of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "bmm")
        return func(*args, **(kwargs or {}))


def outputs_and_gradients(
    model: nn.Module, run: Callable[[], list[Tensor]]
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    model.zero_grad()
    outputs = run()
    torch.stack(
        [(out * torch.linspace(-1, 1, out.shape[-1])).sum() for out in outputs]
    ).sum().backward()
    return outputs, {name: p.grad for name, p in model.named_parameters()}


def assert_alike(
    model: nn.Module, packed: Callable[[], list[Tensor]], apart: Callable[[], list[Tensor]]
) -> None:
    got, got_gradients = outputs_and_gradients(model, packed)
    expected, gradients = outputs_and_gradients(model, apart)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(got_gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def sharpened(model: nn.Module) -> nn.Module:
    """Larger weights than the first ones, so that attention is no mean over tokens."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("last", [None, (2, 4, 1)])
def test_a_packed_block_is_a_call_each(
    recompute: str, scale: float | None, last: tuple[int, ...] | None
) -> None:
    torch.manual_seed(0)
    block = Block(16, 4, layer_scale_init=scale, activation_checkpointing=recompute)  # type: ignore[arg-type]
    sharpened(block)
    batches = [torch.randn(*shape, 16, requires_grad=True) for shape in SHAPES]
    asked = last or (None,) * len(SHAPES)
    packed = Packed(tuple(Sequences(*s, num_last=q) for s, q in zip(SHAPES, asked, strict=True)))
    returned = [
        Sequences(b, t if q is None else q) for (b, t), q in zip(SHAPES, asked, strict=True)
    ]
    assert_alike(
        block,
        lambda: unpack(block(pack(batches), packed=packed), returned),
        lambda: [block(x, num_last=q) for x, q in zip(batches, asked, strict=True)],
    )


def test_a_packed_block_multiplies_once() -> None:
    block = Block(16, 4)
    batches = [torch.randn(*shape, 16) for shape in SHAPES]
    packed = Packed(tuple(Sequences(*shape) for shape in SHAPES))
    with torch.no_grad(), Products() as products:
        block(pack(batches), packed=packed)
    assert products.count == 4  # qkv, proj, and the two of the MLP


@pytest.mark.parametrize("shown", [True, False])
def test_views_of_two_sizes_are_encoded_as_in_two_calls(shown: bool) -> None:
    torch.manual_seed(0)
    vit = sharpened(ViT(CFG))
    images, local = torch.randn(2, 3, 16, 16), torch.randn(6, 3, 8, 8)
    index = torch.stack([torch.randperm(16)[:8] for _ in range(4)]) if shown else None

    def apart() -> list[Tensor]:
        tokens = vit.embed(images)
        own = vit.encode(tokens if index is None else take_cells(tokens, index))
        return [own[:, vit.num_prefix :], vit.encode_cells(local)]

    assert_alike(vit, lambda: list(vit.encode_views(images, index, local)), apart)
    with torch.no_grad(), Products() as together:
        vit.encode_views(images, index, local)
    vit.calls_apart = True
    with torch.no_grad(), Products() as separate:
        vit.encode_views(images, index, local)
    assert (together.count, separate.count) == (2 + 4 * CFG.depth, 2 + 2 * 4 * CFG.depth)


@pytest.mark.parametrize("projector", ["none", "mlp", "batch_norm"])
def test_questions_are_answered_as_in_a_call_each(projector: str) -> None:
    """Of several numbers of images, tokens and cells; a batch norm has each call's statistics."""
    torch.manual_seed(0)
    cfg = DecoderConfig(dim=32, depth=2, num_heads=4, projector=projector)  # type: ignore[arg-type]
    decoder = sharpened(DenseDecoder(cfg, input_dim=24, output_dim=20, input_grid=6))
    questions = [
        Question(
            torch.randn(count, n, 24, requires_grad=True),
            torch.randint(0, 36, (count, n)),
            torch.randn(count, q, 4),
        )
        for count, n, q in ((3, 5, 7), (3, 5, 4), (6, 2, 7))
    ]
    state = {name: b.clone() for name, b in decoder.named_buffers()}

    def apart() -> list[Tensor]:
        decoder.load_state_dict(state, strict=False)
        return [decoder(*question) for question in questions]

    assert_alike(decoder, lambda: decoder.answer(questions), apart)
    with torch.no_grad(), Products() as products:
        decoder.answer(questions)
    calls = len(questions) if projector == "batch_norm" else 1
    own = {"none": 0, "mlp": 2, "batch_norm": 2}[projector]
    assert products.count == calls * (own + 3 + 4 * cfg.depth)  # embed, position, head
