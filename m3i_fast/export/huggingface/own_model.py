"""The model in `folder_code`, which a folder brings with it: what no class of transformers is.

That is both encoders of a run with captions, whose head of pictures reads the mean over patches, a
classifier by that mean, InternImage, and a few ViTs (`native.no_class_for`). Its weights have our
names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from m3i_fast.config.models.internimage import InternImageConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.models.internimage.model import InternImage
from m3i_fast.models.transformer.vit import ViT

CODE = ("modeling_m3i.py", "vision_transformer.py", "internimage.py")
CLASS_NAME = "M3IModel"
CLASSIFIER_NAME = "M3IForImageClassification"
_NAMES = {"log_scale": "logit_scale", "bias": "logit_bias"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTower:
    """Hold the text encoder of a run and the head that projects pictures into its space."""

    cfg: TextConfig
    weights: Mapping[str, Tensor]
    """Those of the caption term: text_encoder.*, head.*, log_scale and, of a sigmoid, bias."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierHead:
    """Hold the head of a run that tells the classes or labels of a picture."""

    names: Sequence[str]
    """Of the logits, in their order."""
    weights: Mapping[str, Tensor]
    """Those of the term's head: head.*."""
    class_embeddings: Tensor | None = None
    """[K, E], of unit length, with which cosines are taken; None: the head gives the logits."""
    log_scale: Tensor | None = None
    """Logarithm of the scale of these cosines, []."""

    @property
    def excludes(self) -> bool:
        """Return whether a picture has one class, in the place of a set of labels."""
        return self.class_embeddings is not None


def code() -> dict[str, bytes]:
    """Return the files of the model's source, which a folder has beside its config.json."""
    folder = Path(__file__).with_name("folder_code")
    return {name: (folder / name).read_bytes() for name in CODE}


def own_model(
    encoder: ViT | InternImage, text: TextTower | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config.json and the weights of M3IModel; these are copies, in fp32 on the CPU.

    Raises ValueError for an InternImage that is a classifier.
    """
    config: dict[str, Any] = {
        "architectures": [CLASS_NAME],
        "model_type": "m3i",
        "dtype": "float32",
        "auto_map": {
            "AutoConfig": "modeling_m3i.M3IConfig",
            "AutoModel": f"modeling_m3i.{CLASS_NAME}",
        },
        "vision": _vit(encoder.cfg) if isinstance(encoder, ViT) else _internimage(encoder.cfg),
    }
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    if text is not None:
        hidden = text.weights.get("head.hidden.weight")
        task = "AutoModelForZeroShotImageClassification"
        config["auto_map"][task] = f"modeling_m3i.{CLASS_NAME}"
        config |= {
            "text": _text(text.cfg),
            "head_dim": 0 if hidden is None else hidden.shape[0],
            "embed_dim": text.cfg.embed_dim,
            "logit_bias": "bias" in text.weights,
        }
        state |= {_text_name(name): value for name, value in text.weights.items()}
    return config, _copies(state)


def own_classifier(
    encoder: ViT | InternImage, head: ClassifierHead
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config.json and weights of M3IForImageClassification, as `own_model` does.

    AutoModel takes the folder, too, as the encoder alone.
    """
    config, weights = own_model(encoder, None)
    hidden, embeddings = head.weights.get("head.hidden.weight"), head.class_embeddings
    config["architectures"] = [CLASSIFIER_NAME]
    config["auto_map"]["AutoModelForImageClassification"] = f"modeling_m3i.{CLASSIFIER_NAME}"
    labels = dict(enumerate(head.names))
    config |= {
        "id2label": labels,
        "label2id": {name: number for number, name in labels.items()},
        "problem_type": f"{'single' if head.excludes else 'multi'}_label_classification",
        "classifier": {
            "head_dim": 0 if hidden is None else hidden.shape[0],
            "embed_dim": None if embeddings is None else embeddings.shape[1],
        },
    }
    state = {f"m3i.{name}": value for name, value in weights.items()}
    state |= {f"classifier.{name}": value for name, value in head.weights.items()}
    if embeddings is not None and head.log_scale is not None:
        state |= {
            "classifier.class_embeddings": embeddings,
            "classifier.logit_scale": head.log_scale,
        }
    return config, _copies(state)


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True).float() for name, value in state.items()}


def _text_name(ours: str) -> str:
    if ours.startswith("head."):
        return f"image_{ours}"
    return _NAMES.get(ours, ours)


def _internimage(cfg: InternImageConfig) -> dict[str, Any]:
    if wrong := [f"{name}: {told}" for name, told in cfg.encoder_conflicts()]:
        raise ValueError("; ".join(wrong))
    return {
        "type": "internimage",
        "image_size": cfg.image_size,
        "channels": cfg.channels,
        "depths": [*cfg.depths],
        "groups": [*cfg.groups],
        "mlp_ratio": cfg.mlp_ratio,
        "offset_scale": cfg.offset_scale,
        "dw_kernel_size": cfg.context_size,
        "post_norm": cfg.post_norm,
        "res_post_norm": cfg.res_post_norm,
        "layer_scale": cfg.layer_scale is not None,
        "center_feature_scale": cfg.center_feature_scale,
        "post_norm_ids": [*(cfg.level2_post_norm_block_ids or ())],
        "dim": cfg.dim,
        "pool_heads": cfg.pool_heads,
        "pooled_dim": cfg.pooled_dim,
    }


def _vit(cfg: ViTConfig) -> dict[str, Any]:
    return {
        "image_size": cfg.image_size,
        "patch_size": cfg.patch_size,
        "dim": cfg.dim,
        "depth": cfg.depth,
        "num_heads": cfg.num_heads,
        "mlp_dim": int(cfg.dim * cfg.mlp_ratio),
        "mlp": cfg.mlp,
        "qkv_bias": cfg.qkv_bias,
        "key_bias": cfg.key_bias,
        "norm_eps": cfg.norm_eps,
        "class_token": cfg.class_token,
        "num_registers": cfg.num_registers,
        "position": cfg.position,
        "pre_norm": cfg.pre_norm,
        "layer_scale": cfg.layer_scale_init is not None,
        "final_norm": cfg.final_norm,
    }


def _text(cfg: TextConfig) -> dict[str, Any]:
    return {
        "vocab_size": cfg.vocab_size,
        "context_length": cfg.context_length,
        "dim": cfg.dim,
        "depth": cfg.depth,
        "num_heads": cfg.num_heads,
        "mlp_dim": int(cfg.dim * cfg.mlp_ratio),
        "attention": cfg.attention,
        "mlp": cfg.mlp,
        "norm_eps": cfg.norm_eps,
    }
