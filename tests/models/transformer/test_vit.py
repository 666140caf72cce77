"""ViT: subsets of tokens, other grids, meta device, recomputation, timm's size and FLOPs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import RotaryEmbeddingDinoV3, calculate_drop_path_rates
from timm.models.eva import EvaAttention
from torch.utils.flop_counter import FlopCounterMode

from m3i_fast.config.models.vit import ViTConfig, vit_b, vit_demo, vit_h, vit_l, vit_s, vit_ti
from m3i_fast.models.transformer.vit import ViT

SMALL = ViTConfig(image_size=32, patch_size=8, dim=32, depth=2, num_heads=2)
PREFIXED = ViTConfig(
    image_size=32,
    patch_size=8,
    dim=32,
    depth=2,
    num_heads=2,
    class_token=True,
    num_registers=3,
    layer_scale_init=0.1,
    drop_path_rate=0.1,
)


def randomise(vit: ViT) -> ViT:
    """Give every parameter a weight that matters, norms and tokens too."""
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return vit


def test_encode_is_equivariant_and_keeps_the_prefix_first() -> None:
    torch.manual_seed(0)
    vit = randomise(ViT(PREFIXED)).eval()
    tokens = vit.embed(torch.randn(2, 3, 32, 32))
    order = torch.randperm(16)
    out, permuted = vit.encode(tokens), vit.encode(tokens[:, order])
    assert out.shape == (2, 4 + 16, 32)
    torch.testing.assert_close(permuted[:, :4], out[:, :4], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(permuted[:, 4:], out[:, 4:][:, order], atol=1e-5, rtol=1e-5)


def test_encode_of_a_subset_sees_nothing_else() -> None:
    vit = randomise(ViT(SMALL))
    images = torch.randn(2, 3, 32, 32)
    changed = images.clone()
    changed[:, :, :8, :8] = 5.0  # patch 0
    own = torch.tensor([1, 5, 6, 11])
    assert torch.equal(
        vit.encode(vit.embed(images)[:, own]), vit.encode(vit.embed(changed)[:, own])
    )
    assert vit.encode(vit.embed(images)[:, own]).shape == (2, 4, 32)


def test_embed_is_each_patch_on_its_own_in_reading_order() -> None:
    vit = randomise(ViT(SMALL))
    images = torch.randn(1, 3, 32, 32)
    weight = vit.patch_embed.weight.flatten(1)
    for index in (0, 1, 4, 15):
        row, column = divmod(index, 4)
        patch = images[0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].flatten()
        expected = weight @ patch + vit.patch_embed.bias + vit.pos_embed[0, index]
        torch.testing.assert_close(vit.embed(images)[0, index], expected, atol=1e-5, rtol=1e-5)


def test_other_image_sizes_interpolate_the_position() -> None:
    vit = randomise(ViT(PREFIXED)).eval()
    assert vit(torch.randn(2, 3, 48, 24)).shape == (2, 4 + 6 * 3, 32)
    blank = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        vit.pos_embed.copy_(torch.arange(4.0).repeat_interleave(4)[None, :, None])  # the row
        vit.patch_embed.bias.zero_()
        rows = vit.embed(blank)[0, :, 0].view(8, 8)
    torch.testing.assert_close(rows, rows[:, :1].expand(8, 8), atol=1e-5, rtol=0)
    assert rows[:, 0].diff().min() > 0


@pytest.mark.parametrize("shape", [(1, 3, 32, 30), (1, 3, 20, 32), (1, 4, 32, 32), (3, 32, 32)])
def test_images_of_a_wrong_shape_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images: expected .* patch_size = 8, got"):
        ViT(SMALL).embed(torch.zeros(shape))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 30),
        ("dim", 33),
        ("dim", 34),
        ("depth", 0),
        ("num_heads", 5),
        ("mlp_ratio", 0.0),
        ("num_registers", -1),
        ("drop_path_rate", 1.0),
    ],
)
def test_bad_sizes_are_refused_by_name(field: str, value: float) -> None:
    named = "dim" if field == "num_heads" else field
    with pytest.raises(ValueError, match=f"{named}: expected .*got"):
        ViTConfig(**{"image_size": 32, "patch_size": 8, "dim": 32, "num_heads": 2, field: value})


def test_built_on_meta_equals_built_directly() -> None:
    torch.manual_seed(0)
    direct = ViT(PREFIXED).state_dict()
    with torch.device("meta"):
        vit = ViT(PREFIXED)
    vit.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.fill_(float("nan"))
    torch.manual_seed(0)
    vit.reset_parameters()
    for name, value in vit.state_dict().items():
        assert torch.equal(value, direct[name]), name


def test_drop_path_rises_as_in_timm() -> None:
    vit = ViT(vit_demo(drop_path_rate=0.3))
    rates = [block.drop_path.rate for block in vit.blocks]
    assert rates == pytest.approx(calculate_drop_path_rates(0.3, 4))


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        (vit_ti, "vit_tiny_patch16_224"),
        (vit_s, "vit_small_patch16_224"),
        (vit_b, "vit_base_patch16_224"),
        (vit_l, "vit_large_patch16_224"),
        (vit_h, "vit_huge_patch14_224"),
    ],
)
def test_parameters_and_flops_equal_timm(ours: Callable[..., ViTConfig], name: str) -> None:
    with torch.device("meta"):
        vit = ViT(ours(class_token=True))
        reference = timm.create_model(name, num_classes=0)
        images = torch.zeros(2, 3, 224, 224)
    counts = [sum(p.numel() for p in m.parameters()) for m in (vit, reference)]
    # timm keeps a position for the class token as well
    assert counts[0] + vit.dim == counts[1]
    flops = []
    for model in (vit, reference.forward_features):
        with FlopCounterMode(display=False) as counter:
            model(images)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


def test_forward_compiles_without_graph_breaks() -> None:
    torch.manual_seed(0)
    cfg = ViTConfig(
        image_size=16, patch_size=8, dim=32, depth=1, num_heads=2, class_token=True, num_registers=1
    )
    vit = randomise(ViT(cfg))
    images = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(vit, fullgraph=True)
    torch.testing.assert_close(compiled(images), vit(images), atol=1e-5, rtol=1e-5)


ROTARY = replace(PREFIXED, position="rotary", drop_path_rate=0.0)


def test_rotary_positions_add_nothing_and_tell_patches_apart() -> None:
    torch.manual_seed(0)
    vit = randomise(ViT(ROTARY))
    assert "pos_embed" not in vit.state_dict()
    same = torch.randn(1, 3, 8, 8).repeat(1, 1, 4, 4)  # every patch shows the same
    assert (vit.embed(same) - vit.embed(same)[:, :1]).abs().max() < 1e-5
    images = torch.randn(1, 3, 32, 32)
    swapped = images.clone()
    swapped[..., :8, :8], swapped[..., :8, 8:16] = images[..., :8, 8:16], images[..., :8, :8]
    out, other = vit(images), vit(swapped)
    assert (out[:, :4] - other[:, :4]).abs().max() > 1e-3  # the prefix sees where they stand
    tokens, centres = vit.embed(images), vit.places(images)
    order = torch.randperm(16)
    permuted = vit.encode(tokens[:, order], centres[:, order])
    torch.testing.assert_close(permuted[:, 4:], out[:, 4:][:, order], atol=1e-5, rtol=1e-4)


def test_rotated_cells_alone_are_where_they_were() -> None:
    torch.manual_seed(0)
    vit = randomise(ViT(ROTARY))
    images, index = torch.randn(2, 3, 32, 32), torch.stack([torch.randperm(16)[:5] for _ in "abcd"])
    alone = vit.encode_alone(images, index)
    for image, cells in enumerate(index):
        at = [x[image % 2 :][:1][:, cells] for x in (vit.embed(images), vit.places(images))]
        torch.testing.assert_close(alone[image], vit.encode(*at)[0, 4:], atol=1e-5, rtol=1e-4)
    assert vit(torch.randn(1, 3, 16, 48)).shape == (1, 4 + 12, 32)  # any size, without a table


def test_attention_with_rotary_positions_is_timms() -> None:
    """One head's worth of a block beside timm's attention of DINOv3, whose prefix is not turned."""
    torch.manual_seed(0)
    vit = randomise(ViT(ROTARY))
    block, x = vit.blocks[0], torch.randn(2, 4 + 16, 32)
    theirs = EvaAttention(32, num_heads=2, num_prefix_tokens=4, rotate_half=True, scale_norm=False)
    angles = RotaryEmbeddingDinoV3(16, rotate_half=True).get_embed([4, 4])
    with torch.no_grad():
        theirs.qkv.weight.copy_(block.layernorm_qkv.weight)
        bias = block.layernorm_qkv.bias
        theirs.q_bias.copy_(bias[:32])
        theirs.v_bias.copy_(bias[64:])
        bias[32:64] = 0  # its keys have none
        theirs.proj.load_state_dict(block.proj.state_dict())
    norm = torch.nn.functional.layer_norm(
        x, (32,), block.layernorm_qkv.layer_norm_weight, block.layernorm_qkv.layer_norm_bias, 1e-6
    )
    rotation = vit._rotation(vit.places(torch.zeros(2, 3, 32, 32)))
    ours = block.proj(block.attention(block.layernorm_qkv(x), rotation=rotation))
    torch.testing.assert_close(ours, theirs(norm, rope=angles), atol=1e-5, rtol=1e-4)


def test_a_wrong_place_is_refused() -> None:
    tokens, centres = torch.zeros(1, 16, 32), torch.zeros(1, 16, 2)
    with pytest.raises(ValueError, match=r"centres: expected \[B, n, 2\] with position = rotary"):
        ViT(ROTARY).encode(tokens)
    with pytest.raises(ValueError, match="centres: expected none with position = absolute"):
        ViT(SMALL).encode(tokens, centres)
    with pytest.raises(ValueError, match="num_heads: expected heads of a multiple of 4"):
        replace(ROTARY, dim=36, num_heads=6)
