"""Every field of an encoder's config is known to every export: computed alike, or refused by name.

A field that is added without a row here fails, and so does a choice of one that has several.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import timm
import torch
from open_clip.model import CustomTextCLIP
from torch import Tensor, nn
from transformers import AutoModel

from m3i_fast.config.models.internimage import InternImageConfig, internimage_demo
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.export.huggingface.native import native_model, no_class_for
from m3i_fast.export.huggingface.own_model import CLASS_NAME, TextTower, code, own_model
from m3i_fast.export.huggingface.save import save_folder
from m3i_fast.export.internimage import load_internimage, to_layout
from m3i_fast.export.open_clip import to_open_clip
from m3i_fast.export.timm_folder import save_timm_folder
from m3i_fast.export.transformer_engine import from_transformer_layers, to_transformer_layers
from m3i_fast.models.internimage.model import InternImage
from m3i_fast.models.transformer.text_encoder import TextEncoder
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.objectives.heads import GlobalHead
from m3i_fast.ops import IMAGENET_MEAN, IMAGENET_STD
from tests.export.models_to_export import perturb

# What training alone reads, which no weight and no feature in evaluation depends on.
TRAINING = {
    "drop_path_rate": 0.5,
    "drop_path_mode": "subset",
    "activation_checkpointing": "full",
    "attention": "math",
}

VIT = ViTConfig(image_size=32, patch_size=8, dim=48, depth=2, num_heads=2)
VIT_FIELDS: dict[str, list[Any]] = {
    **{"image_size": [64], "patch_size": [16], "dim": [32], "depth": [1], "num_heads": [3]},
    **{"mlp_ratio": [2.5], "mlp": ["gelu", "gelu_tanh", "quick_gelu", "swiglu"]},
    **{"qkv_bias": [False], "key_bias": [False], "norm_eps": [1e-5, 1e-3]},
    **{"class_token": [True], "num_registers": [2], "position": ["absolute", "rotary"]},
    **{"layer_scale_init": [0.1], "pre_norm": [True], "final_norm": [False]},
}
TEXT = TextConfig(vocab_size=50, context_length=12, dim=32, depth=2, num_heads=2, embed_dim=24)
TEXT_FIELDS: dict[str, list[Any]] = {
    **{"vocab_size": [60], "context_length": [15], "dim": [48], "depth": [1], "num_heads": [4]},
    **{"mlp_ratio": [2.5], "embed_dim": [16], "attention": ["bidirectional", "causal"]},
    **{"mlp": ["gelu", "gelu_tanh", "quick_gelu"], "norm_eps": [1e-3]},
}
INTERNIMAGE = internimage_demo(
    **{"image_size": 64, "channels": 16, "groups": (1, 2, 4, 8), "token_dim": 32},
    **{"pool_heads": 2, "pooled_dim": 48},
)
INTERNIMAGE_FIELDS: dict[str, list[Any]] = {
    **{"image_size": [96], "channels": [32], "depths": [(1, 2, 2, 1)], "groups": [(2, 4, 4, 8)]},
    **{"mlp_ratio": [2.5], "num_classes": [5], "layer_scale": [0.1], "offset_scale": [2.0]},
    **{"post_norm": [True], "dw_kernel_size": [5], "use_clip_projector": [False]},
    **{"level2_post_norm": [True], "level2_post_norm_block_ids": [(1,)], "res_post_norm": [True]},
    **{"center_feature_scale": [True], "token_dim": [64], "pool_heads": [4], "pooled_dim": [32]},
}
TOGETHER: dict[str, dict[str, Any]] = {
    "level2_post_norm": {"level2_post_norm_block_ids": (0,)},
    "level2_post_norm_block_ids": {"level2_post_norm": True},
}
BOTH: Mapping[type, tuple[Any, dict[str, list[Any]]]] = {
    ViTConfig: (VIT, VIT_FIELDS),
    TextConfig: (TEXT, TEXT_FIELDS),
    InternImageConfig: (INTERNIMAGE, INTERNIMAGE_FIELDS),
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copy the code of folders to no cache of the user's, nor to that of another test."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [*sys.path])
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            patch.delitem(sys.modules, name)
        yield
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[name]


def cases(cls: type) -> list[Any]:
    """Return the configs with one field otherwise, and that field's name."""
    base, values = BOTH[cls]
    made = [("none", base, "")]
    for name, others in values.items():
        for value in others:
            cfg = replace(base, **{name: value}, **TOGETHER.get(name, {}))
            made.append((f"{name}={value}", cfg, name))
    return [pytest.param(cfg, name, id=label) for label, cfg, name in made]


@pytest.mark.parametrize("cls", BOTH)
def test_every_field_and_choice_has_a_row(cls: type) -> None:
    base, values = BOTH[cls]
    assert is_dataclass(cls)
    names = {field.name for field in fields(cls)}
    assert names == values.keys() | (TRAINING.keys() & names), "a new field: see the docstring"
    hints = get_type_hints(cls)
    for name, others in values.items():
        assert any(value != getattr(base, name) for value in others), name
        if get_origin(hints[name]) is Literal:
            assert {*others} == {*get_args(hints[name])}, name


def drawn(module: nn.Module) -> Any:
    torch.manual_seed(0)
    perturb(module)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return module.eval()


def pictures(cfg: ViTConfig | InternImageConfig) -> Tensor:
    return torch.randn(2, 3, cfg.image_size, cfg.image_size)


def same_or_refused(name: str, export: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> bool:
    """Return whether what an export computes is as expected; if it refuses, by the field's name."""
    try:
        pairs = list(export())
    except ValueError as error:
        assert name and name in str(error), error
        return False
    for got, expected in pairs:
        assert expected.std() > 1e-2
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
    return True


# ---- ViT -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cfg", "name"), cases(ViTConfig))
@torch.no_grad()
def test_a_vit_for_transformers(cfg: ViTConfig, name: str, tmp_path: Path) -> None:
    vit, x = drawn(ViT(cfg)), pictures(cfg)

    def export() -> Iterator[tuple[Tensor, Tensor]]:
        config, weights = own_model(vit, None)
        save_folder(tmp_path / "own", config=config, weights=weights, files=code())
        theirs = AutoModel.from_pretrained(tmp_path / "own", trust_remote_code=True)
        assert type(theirs).__name__ == CLASS_NAME
        yield theirs(x).last_hidden_state, vit(x)
        if not no_class_for(cfg):
            native = native_model(vit)
            save_folder(tmp_path / "class", config=native.config, weights=native.state, files={})
            yield AutoModel.from_pretrained(tmp_path / "class")(x).last_hidden_state, vit(x)

    assert same_or_refused(name, export)


@pytest.mark.parametrize(("cfg", "name"), cases(ViTConfig))
@torch.no_grad()
def test_a_vit_for_timm(cfg: ViTConfig, name: str, tmp_path: Path) -> None:
    vit, x = drawn(ViT(cfg)), pictures(cfg)

    def export() -> Iterator[tuple[Tensor, Tensor]]:
        pixels: Any = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "cubic"}
        save_timm_folder(vit, tmp_path / "out", **pixels)
        theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        yield theirs.forward_features(x), vit(x)
        yield theirs(x), vit.encode_cells(x).mean(1)

    kept = same_or_refused(name, export)
    refused = cfg.mlp == "swiglu" or cfg.norm_eps == 1e-3 or cfg.position == "rotary"
    assert kept == (not refused and cfg.key_bias)


@pytest.mark.parametrize(("cfg", "name"), cases(ViTConfig))
def test_a_vit_for_transformer_engine(cfg: ViTConfig, name: str) -> None:
    vit = drawn(ViT(cfg))

    def export() -> Iterator[tuple[Tensor, Tensor]]:
        again = from_transformer_layers(to_transformer_layers(vit), cfg).state_dict()
        yield from ((again[key], value) for key, value in vit.state_dict().items() if value.std())

    assert same_or_refused(name, export) == (cfg.layer_scale_init is None and cfg.key_bias)


# ---- Texts and both towers -----------------------------------------------------------------------


def captions(cfg: TextConfig) -> tuple[Tensor, Tensor]:
    """Ids [4, T] and counts of texts of several lengths, with their end and padding of zeros."""
    counts = torch.tensor([5, cfg.context_length, 2, 7])
    ids = torch.randint(1, cfg.vocab_size - 1, (4, cfg.context_length))
    place = torch.arange(cfg.context_length)
    ids = ids.masked_fill(place == counts[:, None] - 1, cfg.vocab_size - 1)
    return ids.masked_fill(place >= counts[:, None], 0), counts


@pytest.mark.parametrize("hidden", [40, 0])
@pytest.mark.parametrize(("cfg", "name"), cases(TextConfig))
@torch.no_grad()
def test_a_text_encoder_for_transformers(
    cfg: TextConfig, name: str, hidden: int, tmp_path: Path
) -> None:
    vit, text = drawn(ViT(VIT)), drawn(TextEncoder(cfg))
    head = drawn(GlobalHead(VIT.dim, hidden, cfg.embed_dim))
    weights = {f"text_encoder.{key}": value for key, value in text.state_dict().items()}
    weights |= {f"head.{key}": value for key, value in head.state_dict().items()}
    weights["log_scale"] = torch.tensor(2.5)

    def export() -> Iterator[tuple[Tensor, Tensor]]:
        config, state = own_model(vit, TextTower(cfg=cfg, weights=weights))
        save_folder(tmp_path / "out", config=config, weights=state, files=code())
        theirs, said = AutoModel.from_pretrained(
            tmp_path / "out", trust_remote_code=True, output_loading_info=True
        )
        assert not any(said.values()), said
        x, (ids, counts) = pictures(VIT), captions(cfg)
        yield theirs.get_image_features(x).pooler_output, head(vit.encode_cells(x))
        place = torch.arange(cfg.context_length)
        for mask in (None, (place < counts[:, None]).long()):
            yield theirs.get_text_features(ids, mask).pooler_output, text(ids, counts)
        short = ids[2:3, :2]  # as a text alone is, without padding
        yield theirs.get_text_features(short).pooler_output, text(short, counts[2:3])

    assert same_or_refused(name, export)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize(("cfg", "name"), cases(TextConfig))
@torch.no_grad()
def test_a_text_encoder_for_open_clip(cfg: TextConfig, name: str, attention: Any) -> None:
    if name != "attention":
        cfg = replace(cfg, attention=attention)
    vision = replace(VIT, class_token=True)
    kept = open_clip_computes(vision, cfg, "attention" if attention != "causal" else name)
    # its two own towers have QuickGELU or neither
    assert kept == (cfg.attention == "causal" and cfg.mlp != "quick_gelu")


@pytest.mark.parametrize(("cfg", "name"), cases(ViTConfig))
@torch.no_grad()
def test_a_vit_for_open_clip(cfg: ViTConfig, name: str) -> None:
    text = replace(
        TEXT, attention="causal", mlp="quick_gelu" if cfg.mlp == "quick_gelu" else "gelu"
    )
    cfg = replace(cfg, class_token=name != "class_token")
    kept = open_clip_computes(cfg, text, name)
    refused = ("class_token", "num_registers", "final_norm")
    assert kept == (name not in refused and cfg.mlp != "swiglu" and cfg.position == "absolute")


def open_clip_computes(vision: ViTConfig, cfg: TextConfig, name: str) -> bool:
    vit, text = drawn(ViT(vision)), drawn(TextEncoder(cfg))
    head = drawn(GlobalHead(vision.dim, 0, cfg.embed_dim))

    def export() -> Iterator[tuple[Tensor, Tensor]]:
        scale = torch.tensor(2.5)
        made = to_open_clip(vit, head.state_dict(), text, log_scale=scale, bias=None)
        config = {key: value for key, value in made.config.items() if key != "custom_text"}
        theirs = CustomTextCLIP(**config)
        theirs.load_state_dict(made.weights, strict=True)
        x, (ids, counts) = pictures(vision), captions(cfg)
        yield theirs.eval().encode_image(x), head(vit.encode_cells(x))
        yield theirs.encode_text(ids), text(ids, counts)

    return same_or_refused(name, export)


# ---- InternImage ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("cfg", "name"), cases(InternImageConfig))
@torch.no_grad()
def test_an_internimage_for_transformers(cfg: InternImageConfig, name: str, tmp_path: Path) -> None:
    ours, x = drawn(InternImage(cfg)), pictures(cfg)

    def export() -> Iterator[tuple[Tensor, Tensor]]:
        config, weights = own_model(ours, None)
        save_folder(tmp_path / "out", config=config, weights=weights, files=code())
        theirs = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
        tokens = theirs(x).last_hidden_state
        yield tokens, ours.encode_cells(x)
        yield theirs.encoder.summarise(tokens), ours.pool(tokens)

    assert same_or_refused(name, export) == (cfg.use_clip_projector and not cfg.num_classes)


@pytest.mark.parametrize("layout", ["classification", "detection", "huggingface"])
@pytest.mark.parametrize(("cfg", "name"), cases(InternImageConfig))
def test_an_internimage_for_its_own_programs(
    cfg: InternImageConfig, name: str, layout: Any
) -> None:
    ours, detector = drawn(InternImage(cfg)), layout == "detection"

    def export() -> Iterator[tuple[Tensor, Tensor]]:
        theirs = load_internimage(to_layout(ours, layout), cfg, stages_only=detector).state_dict()
        whole = ours.state_dict()
        for key, value in whole.items():
            if not detector or key.startswith(("patch_embed.", "levels.")):
                assert torch.equal(theirs[key], value), key
        last = "levels.3.blocks.0.mlp.fc2.weight"
        yield theirs[last], whole[last]

    assert same_or_refused(name, export)
