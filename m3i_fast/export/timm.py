"""Vision Transformers from and to timm, with equal features.

timm adds a position to its prefix tokens in some models and not in others. Our prefix has no
position, so a prefix position is added to the token itself once, when it is loaded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Set
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from m3i_fast.config.fields import Mlp, expect_depth
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.export.vit_names import VIT_BLOCK, VIT_STEM
from m3i_fast.models.transformer.layers import fc1_features
from m3i_fast.models.transformer.positions import resample_grid
from m3i_fast.models.transformer.vit import ViT

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

Grid = tuple[int, int]  # rows, columns

logger = logging.getLogger(__name__)

# timm applies these after forward_features; they are no part of an encoder
HEAD_PREFIXES = ("head.", "fc_norm.", "attn_pool.")


def load_timm(source: nn.Module | Mapping[str, Tensor], cfg: ViTConfig) -> ViT:
    """Return a ViT with a timm VisionTransformer's weights; `forward` equals `forward_features`.

    source: the model or its bare state dict. Head and pooling weights are left out; positions are
    interpolated where cfg.image_size differs. A global-pool model that normalises after pooling
    (`fc_norm`) has no final norm: set cfg.final_norm = False. A state dict does not contain the
    number of heads, which then is taken from cfg unchecked.

    Raises ValueError naming the parameters that are missing, unexpected or of another shape, or any
    other difference between the model and cfg.
    """
    _expect_timms(cfg)
    grid: Grid | None = None
    if isinstance(source, nn.Module):
        grid = check_model(source, cfg)
        source = source.state_dict()
    head = [name for name in source if name.startswith(HEAD_PREFIXES)]
    if head:
        logger.info("left out, no part of the encoder: %s", ", ".join(head))
    state = {name: value for name, value in source.items() if name not in head}
    names = dict(_names(cfg))
    _check_names(state.keys(), names.keys() | _special_names(cfg))

    vit = ViT(cfg)
    loaded = {ours: state[theirs] for theirs, ours in names.items()}
    loaded.update(_tokens(state, cfg, grid))
    if cfg.pre_norm:
        loaded["patch_embed.bias"] = torch.zeros(cfg.dim)
    wrong = [
        f"{name}: expected {list(value.shape)}, got {list(loaded[name].shape)}"
        for name, value in vit.state_dict().items()
        if loaded[name].shape != value.shape
    ]
    if wrong:
        raise ValueError("timm weights of another size: " + "; ".join(wrong))
    vit.load_state_dict(loaded)
    return vit


def to_timm(vit: ViT) -> VisionTransformer:
    """Return a timm VisionTransformer without head whose `forward_features` equals `vit.forward`.

    Its weights are copies. As in timm's own models, the position covers the class token (with
    zeros) unless there are registers; with pre_norm, where timm's patches have no bias, it contains
    ours. Raises ValueError for rotary positions, and for a bias of queries and values alone.
    """
    from timm.layers import LayerNorm, SwiGLUPacked
    from timm.layers import Mlp as TimmMlp
    from timm.models.vision_transformer import VisionTransformer

    cfg = vit.cfg
    _expect_timms(cfg)
    model = VisionTransformer(
        **timm_arguments(cfg),
        mlp_layer=SwiGLUPacked if cfg.mlp == "swiglu" else TimmMlp,
        act_layer=timm_activation(cfg.mlp),
        norm_layer=partial(LayerNorm, eps=cfg.norm_eps),
        weight_init="skip",
    )
    state = vit.state_dict()
    exported = {theirs: state[ours] for theirs, ours in _names(cfg)}
    position = state["pos_embed"]
    if cfg.pre_norm:
        position = position + state["patch_embed.bias"]
    if cfg.class_token:
        exported["cls_token"] = state["class_token"]
        if not cfg.num_registers:
            position = torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)
    if cfg.num_registers:
        exported["reg_token"] = state["register_tokens"]
    exported["pos_embed"] = position
    model.load_state_dict(exported)
    return model.to(position).train(vit.training)


def timm_activation(mlp: Mlp) -> type[nn.Module]:
    """Return the class of timm's activation in an MLP of this kind."""
    from timm.layers import GELUTanh, QuickGELU

    other = {"swiglu": nn.SiLU, "gelu_tanh": GELUTanh, "quick_gelu": QuickGELU}
    return other.get(mlp, nn.GELU)


def activation_of(act: Any) -> str:
    """Return the kind of an MLP of timm by its activation, as `ViTConfig.mlp`; or its class."""
    from timm.layers import GELU, GELUTanh, QuickGELU

    if isinstance(act, QuickGELU):
        return "quick_gelu"
    if isinstance(act, GELUTanh) or getattr(act, "approximate", "") == "tanh":
        return "gelu_tanh"
    return "gelu" if isinstance(act, GELU | nn.GELU) else type(act).__name__


def described_by_timm(name: str, **arguments: Any) -> dict[str, Any]:
    """Return what a model of timm is beside the shapes of its weights, as fields of a ViTConfig.

    timm builds it by its name and these arguments of `timm.create_model`. ValueError for what is no
    name of timm's own, as hf-hub: and local-dir:, by which it would read elsewhere, and for a model
    that is neither a plain ViT nor DINOv3's.
    """
    import timm

    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f"expected a model that timm has, got {name!r}")
    if "checkpoint_path" in arguments:
        raise ValueError(f"expected no checkpoint_path among the arguments of {name}, got one")
    expect_depth(name, arguments)
    with torch.device("meta"):
        try:
            model = timm.create_model(name, pretrained=False, **arguments)
        except Exception as error:  # whatever the arguments of somebody's config.json lead to
            raise ValueError(f"{name}: timm makes no such model of {arguments}: {error}") from error
    if isinstance(model, timm.models.Eva):  # whose rotary positions are DINOv3's or others
        is_ours = isinstance(model.rope, timm.layers.RotaryEmbeddingDinoV3)
    else:
        is_ours = isinstance(model, timm.models.VisionTransformer)
    if not is_ours:
        raise ValueError(
            f"expected a ViT that ours can be, plain or DINOv3's, got {name}, a "
            f"{type(model).__name__}"
        )
    block = model.blocks[0]
    if not hasattr(block, "mlp") or not hasattr(block.mlp, "act"):
        raise ValueError(f"expected blocks of one attention and one MLP, got those of {name}")
    kind = activation_of(block.mlp.act)
    described = {"norm_eps": block.norm1.eps, "num_heads": block.attn.num_heads}
    return described if kind == "SiLU" else {**described, "mlp": kind}


def timm_arguments(cfg: ViTConfig) -> dict[str, Any]:
    """Return the arguments of timm's VisionTransformer for a config, JSON-able.

    They say neither the kind of the MLP nor the eps of the norms, which are classes there.
    """
    fc1_dim = fc1_features(int(cfg.dim * cfg.mlp_ratio), cfg.mlp)
    return {
        "img_size": cfg.image_size,
        "patch_size": cfg.patch_size,
        "num_classes": 0,
        "global_pool": "token" if cfg.class_token else "avg",
        "embed_dim": cfg.dim,
        "depth": cfg.depth,
        "num_heads": cfg.num_heads,
        "mlp_ratio": (fc1_dim + 0.5) / cfg.dim,  # timm takes int(embed_dim * mlp_ratio)
        "qkv_bias": cfg.qkv_bias,
        # timm reads an initial 0 as "no LayerScale"; the weights have their own values
        "init_values": None if cfg.layer_scale_init is None else 1.0,
        "class_token": cfg.class_token,
        "reg_tokens": cfg.num_registers,
        "no_embed_class": cfg.num_registers > 0,
        "pre_norm": cfg.pre_norm,
        "final_norm": cfg.final_norm,
        "fc_norm": False,
        "drop_path_rate": cfg.drop_path_rate,
        "dynamic_img_size": True,
    }


def _names(cfg: ViTConfig) -> Iterator[tuple[str, str]]:
    """Yield pairs (timm's name, our name) of the parameters that are equal on both sides."""
    other = {"pos_embed", "class_token"}  # `_tokens`
    other |= {"patch_embed.bias"} if cfg.pre_norm else {"norm_pre.weight", "norm_pre.bias"}
    if not cfg.final_norm:
        other |= {"norm.weight", "norm.bias"}
    if not cfg.qkv_bias:
        other.add("layernorm_qkv.bias")
    if cfg.layer_scale_init is None:
        other |= {"layer_scale_1", "layer_scale_2"}
    yield from ((theirs, ours) for (theirs,), ours in VIT_STEM.items() if ours not in other)
    for i in range(cfg.depth):
        for (theirs,), ours in VIT_BLOCK.items():
            if ours not in other:
                yield f"blocks.{i}.{theirs}", f"blocks.{i}.{ours}"


def _expect_timms(cfg: ViTConfig) -> None:
    """Raise ValueError for a config that timm's VisionTransformer has no form of."""
    if cfg.position != "absolute":
        raise ValueError(
            "position: expected absolute, as timm's VisionTransformer has it, got rotary, as its "
            "Eva has it for DINOv3: `vit_weights` reads that"
        )
    if cfg.qkv_bias and not cfg.key_bias:
        raise ValueError(
            "key_bias: expected True, as timm's VisionTransformer has it with qkv_bias, got False"
        )


def _special_names(cfg: ViTConfig) -> set[str]:
    """Return timm's names of the position and the prefix tokens."""
    names = {"pos_embed"}
    if cfg.class_token:
        names.add("cls_token")
    if cfg.num_registers:
        names.add("reg_token")
    return names


def _check_names(got: Set[str], expected: Set[str]) -> None:
    problems = [
        f"{what}: {', '.join(sorted(names))}"
        for what, names in (("missing", expected - got), ("unexpected", got - expected))
        if names
    ]
    if problems:
        raise ValueError("timm weights do not fit this ViTConfig; " + "; ".join(problems))


def check_model(model: nn.Module, cfg: ViTConfig) -> Grid:
    """Refuse what the weights alone do not show, and return the grid of the positions."""
    from timm.models.vision_transformer import Block, VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise ValueError(f"expected a timm VisionTransformer, got {type(model).__name__}")
    for i, block in enumerate(model.blocks):
        if type(block) is not Block:
            raise ValueError(f"blocks.{i}: expected timm's Block, got {type(block).__name__}")
        if block.attn.num_heads != cfg.num_heads:
            raise ValueError(f"num_heads: expected {block.attn.num_heads}, got {cfg.num_heads}")
        _check_mlp(block.mlp, f"blocks.{i}.mlp", cfg)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and not name.startswith(HEAD_PREFIXES):
            if module.eps != cfg.norm_eps:
                raise ValueError(f"{name}.eps: expected {cfg.norm_eps}, got {module.eps}")
    rows, columns = model.patch_embed.grid_size
    return rows, columns


def _check_mlp(mlp: nn.Module, name: str, cfg: ViTConfig) -> None:
    from timm.layers import GluMlp

    act, is_gated = mlp.act, isinstance(mlp, GluMlp)
    if is_gated != (cfg.mlp == "swiglu"):
        raise ValueError(f"{name}: expected {cfg.mlp}, got {type(mlp).__name__}")
    if is_gated and (not isinstance(act, nn.SiLU) or mlp.gate_last):
        raise ValueError(f"{name}: expected SiLU of a gate that comes first, got {mlp}")
    if not is_gated and activation_of(act) != cfg.mlp:
        expected = "the exact GELU" if cfg.mlp == "gelu" else cfg.mlp
        raise ValueError(f"{name}.act: expected {expected}, got {act}")


def _tokens(state: Mapping[str, Tensor], cfg: ViTConfig, grid: Grid | None) -> dict[str, Tensor]:
    """Return our position and prefix tokens from a position that may cover timm's prefix."""
    position = state["pos_embed"]
    if grid is None:
        grid = _square_grid(position.shape[1], cfg)
    covered = position.shape[1] - grid[0] * grid[1]  # prefix tokens that have a position
    if covered not in (0, cfg.num_prefix):
        raise ValueError(
            f"pos_embed: expected {grid[0]} x {grid[1]} positions with none or {cfg.num_prefix} "
            f"before them, got {position.shape[1]}"
        )
    patches = resample_grid(position[:, covered:], grid, (cfg.grid, cfg.grid))
    tokens = {"pos_embed": patches}
    num_class = int(cfg.class_token)
    if cfg.class_token:
        tokens["class_token"] = state["cls_token"]
    if cfg.num_registers:
        tokens["register_tokens"] = state["reg_token"]
    if covered and cfg.class_token:
        tokens["class_token"] = tokens["class_token"] + position[:, :1]
    if covered and cfg.num_registers:
        tokens["register_tokens"] = tokens["register_tokens"] + position[:, num_class:covered]
    return tokens


def _square_grid(length: int, cfg: ViTConfig) -> Grid:
    """Return the grid of a position table of which only the length is known."""
    sides = {math.isqrt(n) for n in (length, length - cfg.num_prefix) if math.isqrt(n) ** 2 == n}
    if len(sides) > 1:  # 9 positions: 3 x 3, or 2 x 2 and a prefix of 5
        sides &= {cfg.grid}
    if len(sides) != 1:
        raise ValueError(
            f"pos_embed: expected the positions of a square grid with none or {cfg.num_prefix} "
            f"before them, got {length}"
        )
    side = sides.pop()
    return side, side
