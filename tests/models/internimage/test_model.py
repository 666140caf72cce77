"""InternImage beside the official code's numbers, and beside itself in other ways of running.

official_internimage.json in tests/shared was written by official_internimage.py from a checkout of
the official repository: outputs, gradients, and the names and shapes of every key.
"""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from torch import Tensor

from m3i_fast import models
from m3i_fast.config.models import internimage as sizes
from m3i_fast.config.models.internimage import InternImageConfig
from m3i_fast.models.internimage.deformable import DCNv3, InternImageLayer, LayerOptions
from m3i_fast.models.internimage.model import InternImage
from m3i_fast.ops import reference
from tests.shared.official_internimage import (
    CASES,
    GOLDEN,
    NAMES,
    TINY,
    TINY_H,
    digest,
    gradient_norms,
    seeded_images,
    seeded_state,
    sketch,
    weigh,
)

OFFICIAL = json.loads(GOLDEN.read_text())


def seeded(cfg: InternImageConfig, **options: Any) -> InternImage:
    model = InternImage(cfg, **options)
    model.load_state_dict(seeded_state(model))
    return model


def assert_sketches(value: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(sketch(value), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_keys_shapes_and_parameters_are_the_official_ones(name: str) -> None:
    with torch.device("meta"):
        model = InternImage(getattr(sizes, f"internimage_{name}")())
    state = model.state_dict()
    expected = OFFICIAL["keys"][name]
    assert len(state) == expected["num_keys"]
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
    assert digest(state) == expected["digest"]


def test_parameter_counts_are_the_published_ones() -> None:
    millions = {"t": 30, "s": 50, "b": 97, "l": 223, "xl": 335, "h": 1090, "g": 3076}
    assert {k: round(v["parameters"] / 1e6) for k, v in OFFICIAL["keys"].items()} == millions


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_the_official_ones(case: str) -> None:
    cfg, image = CASES[case]
    expected = OFFICIAL["cases"][case]
    model = seeded(cfg).eval()
    images = seeded_images(*image).requires_grad_()
    logits = model(images)
    weigh(logits).backward()
    assert_sketches(logits, expected["logits"])
    assert images.grad is not None
    assert_sketches(images.grad, expected["image_gradient"])
    for stage, sketched in zip(model.forward_stages(images), expected["stages"], strict=True):
        assert_sketches(stage, sketched)
    if "gradient_norms" in expected:
        norms = gradient_norms(model)
        assert norms.keys() == expected["gradient_norms"].keys()
        for name, norm in expected["gradient_norms"].items():
            assert norms[name] == pytest.approx(norm, rel=1e-3, abs=1e-5), name
    if "pooled" in expected:
        features = model.forward_features(images)
        assert_sketches(features.tokens, expected["tokens"])
        assert_sketches(features.pooled, expected["pooled"])


@pytest.mark.parametrize("name", ["offset", "mask"])
def test_a_bias_that_is_nan_is_not_hidden(name: str) -> None:
    """Its layer takes any place and any weight, and one without a number is neither."""
    model = seeded(TINY).eval()
    layer = next(module for module in model.modules() if isinstance(module, DCNv3))
    with torch.no_grad():
        getattr(layer, name).bias[0] = torch.nan
    assert model(seeded_images(2, 32)).isnan().all()


def test_official_keywords_build_the_same_model() -> None:
    official = models.InternImage(
        channels=32,
        depths=[1, 1, 3, 1],
        groups=[2, 4, 8, 16],
        mlp_ratio=4.0,
        num_classes=7,
        drop_path_rate=0.1,
        layer_scale=None,
        offset_scale=1.0,
        post_norm=False,
        dw_kernel_size=None,
        use_clip_projector=False,
        level2_post_norm=False,
        level2_post_norm_block_ids=None,
        res_post_norm=False,
        center_feature_scale=False,
    )
    assert official.cfg == replace(TINY, drop_path_rate=0.1)
    with pytest.raises(TypeError, match="chans"):
        InternImage(chans=32)


def test_one_product_equals_the_projections_apart() -> None:
    options = LayerOptions(
        mlp_ratio=4.0,
        layer_scale=None,
        offset_scale=1.0,
        post_norm=False,
        res_post_norm=False,
        dw_kernel_size=3,
        center_feature_scale=True,
    )
    seen: list[Tensor] = []

    def core(x: Tensor, offset: Tensor, mask: Tensor, **geometry: Any) -> Tensor:
        seen[:] = [offset, mask]
        assert geometry.pop("softmax") and offset.is_contiguous() and mask.is_contiguous()
        return reference.dcnv3(x, offset, mask, **geometry, softmax=True)

    layer = DCNv3(32, 2, replace(options, core=core))
    layer.load_state_dict(seeded_state(layer))
    x = torch.randn(2, 5, 6, 32)
    y = layer(x)
    context = layer.dw_conv(x.permute(0, 3, 1, 2))
    torch.testing.assert_close(seen[0], layer.offset(context), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[1], layer.mask(context), atol=1e-5, rtol=1e-5)
    weights = layer.mask(context).unflatten(-1, (2, 9)).softmax(-1).flatten(-2)
    value = layer.input_proj(x)
    geometry = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1, "groups": 2}
    samples = reference.dcnv3(value, layer.offset(context), weights, **geometry)
    gate = F.linear(
        context, layer.center_feature_scale_proj_weight, layer.center_feature_scale_proj_bias
    )
    gate = gate.sigmoid().repeat_interleave(16, dim=-1)
    expected = layer.output_proj(samples * (1 - gate) + value * gate)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cfg", [TINY, TINY_H, CASES["tiny l"][0]], ids=["plain", "h", "l"])
def test_every_parameter_gets_a_gradient(cfg: InternImageConfig) -> None:
    model = seeded(cfg)
    weigh(model(seeded_images(64, 64))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not name.endswith("k_bias"):  # adds the same to every logit of a softmax
            assert parameter.grad.abs().max() > 0, name


def test_a_fresh_layer_samples_where_it_stands_and_averages() -> None:
    model = InternImage(TINY)
    for module in model.modules():
        if isinstance(module, DCNv3):
            x = torch.randn(1, 6, 6, module.input_proj.in_features)
            mean = F.avg_pool2d(module.input_proj(x).permute(0, 3, 1, 2), 3, 1, 1)
            expected = module.output_proj(mean.permute(0, 2, 3, 1))
            torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-4)


def test_dense_tokens_are_cells_of_both_stages_in_reading_order() -> None:
    model = seeded(TINY_H).eval()
    images = seeded_images(64, 96)
    *_, third, fourth = model.forward_stages(images)
    tokens = model.encode_cells(images)
    assert third.shape[1:3] == (4, 6) and fourth.shape[1:3] == (2, 3)
    assert tokens.shape == (2, 24, 1024)
    for row, column in ((0, 0), (1, 5), (3, 2)):
        weight = model.dcnv3_head_x4[0].weight.flatten(1)
        coarse = weight @ fourth[0, row // 2, column // 2] + model.dcnv3_head_x4[0].bias
        coarse = coarse.view(1024, 2, 2)[:, row % 2, column % 2]
        fine = model.dcnv3_head_x3.weight.flatten(1) @ third[0, row, column]
        expected = fine + model.dcnv3_head_x3.bias + coarse
        torch.testing.assert_close(tokens[0, row * 6 + column], expected, atol=1e-4, rtol=1e-4)
    features = model.forward_features(images)
    assert torch.equal(features.tokens, tokens)
    order = torch.randperm(24)
    torch.testing.assert_close(model.pool(tokens[:, order]), features.pooled, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.summarise(tokens)[:, 0], features.pooled)
    torch.testing.assert_close(model(images), model.head(features.pooled))


def test_built_on_meta_equals_built_directly() -> None:
    torch.manual_seed(0)
    direct = InternImage(replace(TINY_H, token_dim=64)).state_dict()
    with torch.device("meta"):
        model = InternImage(replace(TINY_H, token_dim=64))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    torch.manual_seed(0)
    model.reset_parameters()
    for name, value in model.state_dict().items():
        assert torch.equal(value, direct[name]), name


def test_drop_path_rises_as_in_timm_and_drops_whole_samples() -> None:
    model = InternImage(TINY, drop_path_rate=0.5)
    layers = [m for m in model.modules() if isinstance(m, InternImageLayer)]
    rates = [layer.drop_path.rate for layer in layers]
    assert rates == pytest.approx(calculate_drop_path_rates(0.5, 6))
    last = layers[-1]
    x = torch.randn(64, 2, 2, 256)
    moved = (last(x) - x).flatten(1).norm(dim=1)
    assert 0 < int((moved == 0).sum()) < 40  # both branches dropped: one in four
    assert ((last.eval()(x) - x).flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("channels", 33),
        ("depths", (1, 1, 1)),
        ("groups", (3, 4, 8, 16)),
        ("mlp_ratio", 0.0),
        ("num_classes", -1),
        ("drop_path_rate", 1.0),
        ("dw_kernel_size", 4),
        ("token_dim", 100),
        ("image_size", 48),
        ("post_norm", True),
        ("layer_scale", 1.0),
        ("level2_post_norm", False),
        ("level2_post_norm_block_ids", (1, 3)),
    ],
)
def test_bad_options_are_refused_by_name(field: str, value: object) -> None:
    named = "level2_post_norm_block_ids" if field == "level2_post_norm" else field
    with pytest.raises(ValueError, match=rf"{named}(\[0\])?: expected .*, got"):
        replace(TINY_H, **{field: value})  # type: ignore[arg-type]


def test_images_and_uses_that_do_not_fit_are_named() -> None:
    model = InternImage(TINY_H)
    with pytest.raises(ValueError, match=r"images: expected .* 32, got \[1, 3, 64, 48\]"):
        model(torch.zeros(1, 3, 64, 48))
    with pytest.raises(ValueError, match=r"images: expected .*, got \[1, 4, 64, 64\]"):
        model(torch.zeros(1, 4, 64, 64))
    with pytest.raises(ValueError, match="use_clip_projector: expected True for dense tokens"):
        InternImage(TINY).forward_features(torch.zeros(1, 3, 64, 64))
