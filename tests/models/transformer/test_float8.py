"""FP8 layers against torchao's own module, fp64 and the torch body; counted by the profiler too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import mkldnn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear

from m3i_fast.config.models.internimage import internimage_demo
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import vit_demo
from m3i_fast.models.image_encoder import build_encoder
from m3i_fast.models.internimage.model import InternImage
from m3i_fast.models.transformer import float8
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, Block, BlockLayers
from m3i_fast.models.transformer.float8 import FLOAT8_LAYERS, float8_linear
from m3i_fast.models.transformer.text_encoder import TextEncoder
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.models.transformer.wide_layers import is_wide, wide_only

TEXT = TextConfig(vocab_size=50, context_length=8, dim=32, depth=1, num_heads=2, embed_dim=16)
INTERNIMAGE = internimage_demo(
    image_size=64, channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), token_dim=32
)


def _gradients(
    linear: Callable[[Tensor, Tensor, Tensor], Tensor],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Tensor]:
    """Output and gradients of x [2, 24, 64], weight [96, 64], bias [96], on the CPU."""
    torch.manual_seed(0)
    drawn = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 24, 64), (96, 64), (96,)))
    x, weight, bias = (t.to(device, dtype).requires_grad_() for t in drawn)
    y = linear(x, weight, bias)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(device, y.dtype))
    return [y.detach().cpu(), *(t.grad.cpu() for t in (x, weight, bias) if t.grad is not None)]


def _torchaos_module(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    config = Float8LinearConfig.from_recipe_name("tensorwise")
    module = Float8Linear(64, 96, bias=True, config=config, device="meta")
    parameters = {"weight": weight, "bias": bias}
    return torch.func.functional_call(module, parameters, (x,))


def test_products_are_torchaos_bit_for_bit() -> None:
    enabled = mkldnn.set_flags(_enabled=False)[0]  # oneDNN adds up in another order
    theirs = _gradients(_torchaos_module)
    mkldnn.set_flags(_enabled=enabled)
    for found, wanted in zip(_gradients(float8_linear), theirs, strict=True):
        assert torch.equal(found, wanted)
    assert torch._C._get_mkldnn_enabled() == enabled


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_products_are_within_the_rounding_of_fp8_and_no_nearer(device: str) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs sm_89 or newer")
    exact = _gradients(F.linear, torch.float64)
    # e4m3 rounds to 1/16 and e5m2, gradients', to 1/8; most roundings are smaller, and cancel.
    bounds = (0.05, 0.06, 0.06)
    ours = _gradients(float8_linear, torch.bfloat16, device)
    for found, wanted, bound in zip(ours, exact, bounds, strict=False):
        error = ((found.double() - wanted).norm() / wanted.norm()).item()
        assert 0.01 < error < bound


def test_autocast_rounds_what_is_kept_to_bf16_and_keeps_the_gradients_types() -> None:
    def rounded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return float8_linear(x.bfloat16(), weight, bias)

    with torch.autocast("cpu", torch.bfloat16):
        found = _gradients(float8_linear)
    assert [t.dtype for t in found] == [torch.bfloat16, *(torch.float32,) * 3]
    for ours, wanted in zip(found, _gradients(rounded), strict=True):
        assert torch.equal(ours, wanted)


def test_gathered_weights_of_bf16_have_gradients_of_bf16() -> None:
    assert {t.dtype for t in _gradients(float8_linear, torch.bfloat16)} == {torch.bfloat16}


@pytest.mark.parametrize(
    "build",
    [
        partial(ViT, vit_demo(image_size=32, dim=32, depth=2, num_heads=2, layer_scale_init=0.1)),
        partial(TextEncoder, TEXT),
        partial(InternImage, INTERNIMAGE),
    ],
    ids=["vit", "text", "internimage"],
)
def test_bodies_have_one_state_dict(build: Callable[..., nn.Module]) -> None:
    states = []
    for layers in (TORCH_LAYERS, FLOAT8_LAYERS):
        torch.manual_seed(0)
        model = build(layers=layers)
        torch.manual_seed(1)
        model.reset_parameters()  # type: ignore[operator]
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def _num_run(model: Callable[[], Tensor]) -> tuple[int, int, int]:
    """Products that ran forward and backward: as the layers count, and as torch saw in all."""
    before = copy.copy(float8.PRODUCTS)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        model().float().square().sum().backward()
    scaled = sum(each.count for each in seen.key_averages() if each.key == "aten::_scaled_mm")
    now = float8.PRODUCTS
    return now.forward - before.forward, now.backward - before.backward, scaled


@pytest.mark.parametrize(
    ("min_dim", "layers"),
    [(16, 8), (128, 8), (129, 0), (10_000, 0)],  # of 2 blocks: qkv, projection and two of the MLP
)
def test_every_wide_product_of_a_vit_runs_in_fp8(min_dim: int, layers: int) -> None:
    vit = build_encoder(vit_demo(image_size=32, depth=2), layers=wide_only(FLOAT8_LAYERS, min_dim))
    images = torch.randn(4, 3, 32, 32)
    assert _num_run(lambda: vit.encode_cells(images)) == (layers, 2 * layers, 3 * layers)


def test_a_narrow_layer_changes_neither_attention_nor_recomputation() -> None:
    """Transformer Engine's checkpointing has to be around its layers, wide or not."""
    for cfg in (vit_demo(image_size=32, depth=2), INTERNIMAGE):
        chosen: list[str] = []
        layers = replace(FLOAT8_LAYERS, checkpoint=chosen.append)
        cfg = replace(cfg, activation_checkpointing="full")
        build_encoder(cfg, layers=wide_only(layers, 10_000))
        assert set(chosen) == {"full"}, cfg


def test_the_projections_and_mlps_of_internimage_run_in_fp8() -> None:
    model = build_encoder(INTERNIMAGE, layers=wide_only(FLOAT8_LAYERS, 32))
    images = torch.randn(4, 3, 64, 64)
    found = _num_run(lambda: model.encode_cells(images))
    assert found == (12, 24, 36)  # four a layer in three stages; the first is 16 channels wide


@pytest.mark.parametrize(
    ("dims", "min_dim", "wide"),
    [
        ((768, 3072), 768, True),
        ((768, 3072), 769, False),
        ((3072, 768), 769, False),
        ((776, 3072), 512, False),
        ((768, 1000), 512, False),
        ((16, 16), 1, True),
    ],
)
def test_what_is_wide(dims: tuple[int, int], min_dim: int, wide: bool) -> None:
    assert is_wide(*dims, min_dim) == wide


def _block(layers: BlockLayers, run: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    block = Block(32, 2, layers=layers)
    x = torch.randn(2, 8, 32, requires_grad=True)
    y = run(block, x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]


def test_recomputed_and_compiled_blocks_give_the_same_gradients() -> None:
    def recomputed(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False)

    def compiled(block: nn.Module, x: Tensor) -> Tensor:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        return block(x)

    plain = _block(FLOAT8_LAYERS, lambda block, x: block(x))
    for way in (recomputed, compiled):
        for ours, wanted in zip(_block(FLOAT8_LAYERS, way), plain, strict=True):
            torch.testing.assert_close(ours, wanted)
    narrow = _block(TORCH_LAYERS, lambda block, x: block(x))
    assert not torch.equal(narrow[0], plain[0])
