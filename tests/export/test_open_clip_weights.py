"""open_clip's models of random weights, taken as a start: their features are the oracle."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transform import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file
from torch import Tensor, nn

from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import (
    ViTConfig,
    clip_b16,
    clip_b32,
    clip_h14,
    clip_l14,
    dinov3_s,
    vit_b,
)
from m3i_fast.export.open_clip_weights import (
    CONFIG,
    WEIGHTS,
    image_weights,
    read_open_clip,
    text_weights,
)
from m3i_fast.export.vit_weights import vit_weights
from m3i_fast.export.weight_files import read_weights, tensors_in
from m3i_fast.models.transformer.text_encoder import TextEncoder
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.ops import IMAGENET_MEAN, IMAGENET_STD

SMALL = {"image_size": 32, "patch_size": 8, "dim": 128, "depth": 2, "num_heads": 2}
VISION = clip_b16(**SMALL)
TEXT = TextConfig(
    **{"vocab_size": 90, "context_length": 12, "dim": 64, "depth": 2, "num_heads": 1},
    **{"embed_dim": 24, "norm_eps": 1e-5},
    attention="causal",
)
OUR_PIXELS = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
VISION_CFG = {"image_size": 32, "patch_size": 8, "width": 128, "layers": 2}
TEXT_CFG = {"context_length": 12, "vocab_size": 90, "width": 64, "heads": 1, "layers": 2}
MODEL = {"embed_dim": 24, "vision_cfg": VISION_CFG, "text_cfg": TEXT_CFG}


def drawn(model: nn.Module) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def written(folder: Path, model: nn.Module, config: dict[str, Any] | None = None) -> Path:
    """A folder as open_clip writes it, or without a config its file alone."""
    folder.mkdir()
    save_file(model.state_dict(), folder / WEIGHTS[0])
    if config is None:
        return folder / WEIGHTS[0]
    content = {"model_cfg": config, "preprocess_cfg": OUR_PIXELS}
    (folder / CONFIG).write_text(json.dumps(content))
    return folder


def loaded(place: Path, cfg: ViTConfig) -> ViT:
    weights = image_weights(read_open_clip(place), cfg)
    assert not weights.new
    vit = ViT(cfg)
    vit.load_state_dict(weights.tensors)
    return vit.eval()


def tokens_of(model: Any, images: Tensor) -> Tensor:
    """All tokens of the image tower after its last norm, before they are pooled and projected."""
    found = model.visual.forward_intermediates(
        images, indices=1, normalize_intermediates=True, output_fmt="NLC", output_extra_tokens=True
    )
    prefix = found.get("image_intermediates_prefix", [images.new_zeros(len(images), 0, 1)])[0]
    patches = found["image_intermediates"][0]
    return torch.cat([prefix, patches], 1) if prefix.shape[1] else patches


@torch.no_grad()
def assert_features(vit: ViT, model: Any) -> None:
    vit, model = (
        vit.double(),
        deepcopy(model).double(),
    )  # but for the class token with its place, a float32
    images = torch.randn(2, 3, vit.cfg.image_size, vit.cfg.image_size, dtype=torch.float64)
    expected = tokens_of(model, images)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(vit(images), expected, atol=1e-6, rtol=1e-6)
    if vit.cfg.class_token:  # and by what open_clip makes of them
        pooled = vit(images)[:, 0] @ model.visual.proj
        torch.testing.assert_close(pooled, model.encode_image(images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def assert_texts(place: Path, model: Any, cfg: TextConfig) -> dict[str, str]:
    weights = text_weights(read_open_clip(place), cfg)
    text = TextEncoder(cfg)
    text.load_state_dict(weights.tensors)
    num_tokens = torch.tensor([5, cfg.context_length, 2])
    place_ = torch.arange(cfg.context_length)
    ids = torch.randint(1, cfg.vocab_size - 2, (3, cfg.context_length))
    end = place_ == num_tokens[:, None] - 1
    ids = ids.masked_fill(place_ >= num_tokens[:, None], 0)
    vocab_size = len(model.token_embedding.weight)
    theirs = torch.zeros(3, model.context_length, dtype=torch.int64)
    theirs[:, : cfg.context_length] = ids.masked_fill(end, vocab_size - 1)
    got = text.eval()(ids.masked_fill(end, cfg.vocab_size - 1), num_tokens)
    torch.testing.assert_close(got, model.encode_text(theirs), atol=1e-5, rtol=1e-5)
    return weights.changes


@pytest.mark.parametrize(
    ("changes", "vision", "text"),
    [
        ({}, {}, {}),
        ({"quick_gelu": True}, {"mlp": "quick_gelu"}, {"mlp": "quick_gelu"}),
        (
            {
                "vision_cfg": VISION_CFG
                | {"ls_init_value": 0.1, "head_width": 32, "norm_kwargs": {"eps": 1e-6}}
                | {"no_ln_pre": True, "mlp_ratio": 3.0, "act_kwargs": {"approximate": "tanh"}}
            },
            {"layer_scale_init": 1e-5, "num_heads": 4, "norm_eps": 1e-6, "pre_norm": False}
            | {"mlp_ratio": 3.0, "mlp": "gelu_tanh"},
            {},
        ),
    ],
)
def test_a_folder_gives_open_clips_features(
    changes: dict[str, Any], vision: dict[str, Any], text: dict[str, Any], tmp_path: Path
) -> None:
    config = MODEL | changes
    model = drawn(CLIP(**config))
    place = written(tmp_path / "folder", model, config)
    assert_features(loaded(place, replace(VISION, **vision)), model)
    assert not assert_texts(place, model, replace(TEXT, **text))


def test_a_file_alone_is_believed_to_be_as_the_run(tmp_path: Path) -> None:
    """Its text tower stands below text. in newer files; what it does not say the config says."""
    model = drawn(CLIP(**MODEL, quick_gelu=True))
    file = written(tmp_path / "file", model)
    quick = replace(VISION, mlp="quick_gelu")
    assert_features(loaded(file, quick), model)
    newer = CustomTextCLIP(**MODEL, quick_gelu=True)
    old = model.state_dict()
    towers = ("visual.", "logit_")
    newer.load_state_dict({n if n.startswith(towers) else f"text.{n}": v for n, v in old.items()})
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{n}": v for n, v in newer.state_dict().items()}},
        tmp_path / "epoch_3.pt",
    )
    assert_features(loaded(tmp_path / "epoch_3.pt", quick), model)
    assert_texts(tmp_path / "epoch_3.pt", model, replace(TEXT, mlp="quick_gelu"))
    found = image_weights(read_open_clip(file), quick)
    assert found.sources["blocks.1.proj.weight"] == (
        "visual.transformer.resblocks.1.attn.out_proj.weight"
    )
    assert found.changes["patch_embed.bias"] == "zeros"
    assert set(found.left_out) == {"visual.proj", "logit_scale"}


def test_a_siglip_like_tower_of_timm(tmp_path: Path) -> None:
    """Without class token, with attention pooling, of a tanh GELU that the config's name tells."""
    name = "vit_base_patch32_siglip_256"
    torch.manual_seed(0)
    trunk = timm.create_model(name, depth=2)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    state = {f"visual.trunk.{key}": value for key, value in trunk.state_dict().items()}
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(state, folder / WEIGHTS[0])
    vision = {"image_size": 256, "timm_model_name": name, "timm_pool": "map", "timm_proj": "none"}
    model_cfg = {"embed_dim": 768, "vision_cfg": vision, "text_cfg": {}}
    config = {"model_cfg": model_cfg, "preprocess_cfg": OUR_PIXELS}
    (folder / CONFIG).write_text(json.dumps(config))
    cfg = vit_b(image_size=256, patch_size=32, depth=2, mlp="gelu_tanh")
    weights = image_weights(read_open_clip(folder), cfg)
    assert weights.sources["norm.weight"] == "visual.trunk.norm.weight"
    assert "visual.trunk.attn_pool.q.weight" in weights.left_out and not weights.new
    vit = ViT(cfg).eval()
    vit.load_state_dict(weights.tensors)
    images = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        torch.testing.assert_close(
            vit(images), trunk.eval().forward_features(images), atol=1e-5, rtol=1e-5
        )
    with pytest.raises(ValueError, match="add --vision.mlp gelu_tanh"):
        image_weights(read_open_clip(folder), replace(cfg, mlp="gelu"))
    with pytest.raises(ValueError, match="expected a text tower as CLIP's"):
        text_weights(read_open_clip(folder), TEXT)


@pytest.mark.parametrize(
    ("said", "mean", "std"),
    [
        (
            {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD},
            *(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD),
        ),
        (None, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD),  # open_clip's own default
        ({"size": 32, "std": 0.25}, OPENAI_DATASET_MEAN, (0.25,) * 3),
        ({"mean": 0.5, "std": [0.5]}, (0.5,) * 3, (0.5,) * 3),
    ],
)
def test_pixels_may_be_normalised_by_other_numbers(
    said: dict[str, Any] | None, mean: tuple[float, ...], std: tuple[float, ...], tmp_path: Path
) -> None:
    """The features are those of the picture, though open_clip subtracts another mean from it."""
    model = drawn(CLIP(**MODEL))
    place = written(tmp_path / "folder", model)
    config = {"model_cfg": MODEL} | ({} if said is None else {"preprocess_cfg": said})
    (place.parent / CONFIG).write_text(json.dumps(config))
    vit = loaded(place.parent, VISION)
    picture = torch.rand(2, 3, 32, 32)

    def by(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (picture - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    with torch.no_grad():
        got = vit(by(IMAGENET_MEAN, IMAGENET_STD))
        expected = tokens_of(model, by(mean, std))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    changes = image_weights(read_open_clip(place.parent), VISION).changes
    assert changes["patch_embed.bias"] == "zeros, for pixels by ImageNet's mean and deviation"


def test_a_smaller_vocabulary_and_context_take_the_first_tokens(tmp_path: Path) -> None:
    model = drawn(CLIP(**MODEL))
    place = written(tmp_path / "folder", model, MODEL)
    changes = assert_texts(place, model, replace(TEXT, vocab_size=60, context_length=7))
    assert changes == {
        "token_embedding.weight": "the first 58 of 90 tokens, start and end",
        "pos_embed": "the first 7 of 12 positions",
    }
    with pytest.raises(ValueError, match="expected 91 tokens and 12 positions, .* got 90 and 12"):
        text_weights(read_open_clip(place), replace(TEXT, vocab_size=91))


def test_another_text_tower_is_refused_with_the_flags_that_make_ours_it(tmp_path: Path) -> None:
    model = drawn(CLIP(**MODEL, quick_gelu=True))
    place = written(tmp_path / "folder", model, MODEL | {"quick_gelu": True})
    ours = TextConfig(vocab_size=90, context_length=12, dim=32, depth=1, num_heads=2, embed_dim=16)
    with pytest.raises(ValueError) as error:
        text_weights(read_open_clip(place), ours)
    assert str(error.value).endswith(
        "add --text.dim 64 --text.depth 2 --text.embed-dim 24 --text.attention causal "
        "--text.num-heads 1 --text.norm-eps 1e-05 --text.mlp quick_gelu"
    )


@pytest.mark.parametrize(
    ("changed", "flags"),
    [
        ({"pre_norm": False}, "--vision.pre-norm"),
        ({"norm_eps": 1e-6}, "--vision.norm-eps 1e-05"),
        ({"num_heads": 4}, "--vision.num-heads 2"),
        ({"mlp": "quick_gelu"}, "--vision.mlp gelu"),
        ({"dim": 64, "num_heads": 1}, "--vision.dim 128 --vision.num-heads 2"),
    ],
)
def test_another_image_tower_is_refused_with_its_flags(
    changed: dict[str, Any], flags: str, tmp_path: Path
) -> None:
    model = drawn(CLIP(**MODEL))
    place = written(tmp_path / "folder", model, MODEL)
    with pytest.raises(ValueError) as error:
        image_weights(read_open_clip(place), replace(VISION, **changed))
    assert "nearest to clip_" in str(error.value)
    assert str(error.value).endswith(f": add {flags}"), error.value


def test_files_of_other_models_are_told_apart(tmp_path: Path) -> None:
    resnet = CLIP(**MODEL | {"vision_cfg": VISION_CFG | {"layers": [1, 1, 1, 1], "width": 32}})
    place = written(tmp_path / "resnet", resnet)
    with pytest.raises(ValueError, match=r"expected the names of open_clip.*visual\.conv1"):
        image_weights(read_open_clip(place), VISION)
    normed = CLIP(**MODEL | {"vision_cfg": VISION_CFG | {"qk_norm": True}})
    place = written(tmp_path / "normed", normed)
    with pytest.raises(ValueError, match=r"more in it: blocks\.0\.attn\.ln_k\.bias"):
        image_weights(read_open_clip(place), VISION)
    with pytest.raises(FileNotFoundError, match="expected a folder of open_clip with"):
        read_open_clip(tmp_path / "normed")
    state = tensors_in(read_weights(place))
    with pytest.raises(ValueError, match="a name of open_clip: type open_clip: in place of timm:"):
        vit_weights(state, "timm", VISION)


def trunk_folder(folder: Path, name: Any, state: dict[str, Tensor]) -> Path:
    """A folder of a model whose image tower is timm's, without texts."""
    folder.mkdir()
    save_file({f"visual.trunk.{key}": v for key, v in state.items()}, folder / WEIGHTS[0])
    model_cfg = {"embed_dim": 8, "vision_cfg": {"timm_model_name": name}, "text_cfg": {}}
    config = {"model_cfg": model_cfg, "preprocess_cfg": OUR_PIXELS}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_pe_core_tiny_patch16_384", "got vit_pe_core_tiny_patch16_384, a Eva"),
        ("vit_small_patch16_rope_224", "a Eva"),
        ("convnext_tiny", "plain or DINOv3's, got convnext_tiny, a ConvNeXt"),
        ("hf-hub:user/x", "expected a model that timm has, got 'hf-hub:user/x'"),
        ("local-dir:FOLDER", "expected a model that timm has, got 'local-dir:"),
        (3, "expected a model that timm has, got 3"),
    ],
)
def test_an_image_tower_that_timm_names_otherwise_is_refused(
    name: Any, message: str, tmp_path: Path
) -> None:
    """Nor is anything read or downloaded that an untrusted name leads to."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"num_classes": 0}}
    (elsewhere / "config.json").write_text(json.dumps(config))
    state = timm.create_model("vit_tiny_patch16_224", depth=1).state_dict()
    if name == "local-dir:FOLDER":
        name = f"local-dir:{elsewhere}"
    place = trunk_folder(tmp_path / "folder", name, state)
    with pytest.raises(ValueError, match=message):
        image_weights(read_open_clip(place), vit_b(dim=192, depth=1, num_heads=3, class_token=True))


def test_a_trunk_of_dinov3_is_taken(tmp_path: Path) -> None:
    name = "vit_small_patch16_dinov3_qkvb"
    trunk = drawn(timm.create_model(name, depth=2, num_classes=0))
    vit = loaded(
        trunk_folder(tmp_path / "folder", name, trunk.state_dict()),
        dinov3_s(depth=2, image_size=64),
    )
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = trunk.forward_features(images)
        torch.testing.assert_close(vit(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"ls_init_value": 0.1}, r"resblocks\.0\.ls_1\.gamma: expected none"),
        ({"qk_norm": True}, r"more in it: .*resblocks\.0\.attn\.ln_q"),
        ({"scaled_cosine_attn": True}, r"more in it: .*resblocks\.0\.attn\.logit_scale"),
        ({"scale_heads": True}, r"more in it: .*resblocks\.0\.attn\.head_scale"),
        ({"scale_attn_inner": True}, r"more in it: .*resblocks\.0\.attn\.ln_inner"),
        ({"scale_attn": True}, r"more in it: .*resblocks\.0\.ln_attn"),
    ],
)
def test_a_text_tower_with_more_in_its_blocks_is_refused(
    options: dict[str, Any], part: str, tmp_path: Path
) -> None:
    config = MODEL | {"text_cfg": TEXT_CFG | options}
    place = written(tmp_path / "folder", CLIP(**config), config)
    with pytest.raises(ValueError, match=part):
        text_weights(read_open_clip(place), TEXT)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("ViT-B-32", clip_b32),
        ("ViT-B-16", clip_b16),
        ("ViT-L-14", clip_l14),
        ("ViT-H-14", clip_h14),
    ],
)
def test_the_published_sizes_are_those_of_open_clip(name: str, make: Any) -> None:
    """Every weight has its place and shape; heads, eps and GELU are as their configs have them."""
    from m3i_fast.export.open_clip_weights import OpenClipFile

    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        state = CLIP(**config).state_dict()
    file = OpenClipFile(path=Path(name), state=state, config=config, pixels=OUR_PIXELS)
    weights = image_weights(file, make())
    assert weights.architecture == make.__name__ and not weights.new
    text = config["text_cfg"]
    cfg = TextConfig(
        dim=text["width"],
        depth=text["layers"],
        num_heads=text["heads"],
        embed_dim=config["embed_dim"],
        attention="causal",
        norm_eps=1e-5,
    )
    assert len(text_weights(file, cfg).tensors) == len(
        TextEncoder(replace(cfg, depth=1)).state_dict()
    ) + (12 * (cfg.depth - 1))


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16-SigLIP"])
def test_models_of_open_clip_at_their_size(name: str, tmp_path: Path) -> None:
    """Built by open_clip.create_model with random weights; nothing is downloaded."""
    torch.manual_seed(0)
    model = drawn(open_clip.create_model(name, pretrained=None, pretrained_text=False))
    config = open_clip.get_model_config(name)
    place = written(tmp_path / "folder", model, config)
    siglip = "SigLIP" in name
    cfg = vit_b() if siglip else clip_b32(mlp="quick_gelu" if "quick" in name else "gelu")
    vit = loaded(place, cfg)
    images = torch.randn(1, 3, 224, 224)
    if siglip:
        with torch.no_grad():
            expected = model.visual.trunk.forward_features(images)
            torch.testing.assert_close(vit(images), expected, atol=1e-5, rtol=1e-5)
        return
    assert_features(vit, model)
    text = TextConfig(attention="causal", norm_eps=1e-5, mlp=cfg.mlp)  # type: ignore[arg-type]
    assert_texts(place, model, text)
