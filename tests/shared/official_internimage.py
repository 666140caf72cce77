"""What the official InternImage computes, kept as numbers: the oracle of test_internimage.py.

    python -m tests.shared.official_internimage CHECKOUT

writes official_internimage.json beside this file. CHECKOUT is a checkout of OpenGVLab/InternImage
(MIT), of which nothing is kept here; its plain-torch core is run, on a CPU, with weights that
depend on nothing but their names and shapes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
import types
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from m3i_fast.config.models import internimage as sizes
from m3i_fast.config.models.internimage import InternImageConfig

GOLDEN = Path(__file__).with_suffix(".json")
NAMES = ("t", "s", "b", "l", "xl", "h", "g")

TINY = InternImageConfig(channels=32, depths=(1, 1, 3, 1), groups=(2, 4, 8, 16), num_classes=7)
TINY_H = replace(
    TINY,
    groups=(1, 2, 4, 8),
    dw_kernel_size=5,
    use_clip_projector=True,
    level2_post_norm=True,
    level2_post_norm_block_ids=(0, 2),
    res_post_norm=True,
    center_feature_scale=True,
)
# configs and the sides of an image that they are run with
CASES: dict[str, tuple[InternImageConfig, tuple[int, int]]] = {
    "t": (sizes.internimage_t(), (64, 96)),
    "s": (sizes.internimage_s(), (64, 64)),
    "tiny pre-norm": (TINY, (80, 72)),
    "tiny l": (replace(TINY, layer_scale=1e-5, post_norm=True, offset_scale=2.0), (64, 64)),
    "tiny scaled": (replace(TINY, layer_scale=1.0), (64, 64)),
    "tiny h": (TINY_H, (96, 64)),
    "tiny g": (replace(TINY_H, res_post_norm=False, post_norm=True), (64, 64)),
}


def seeded_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights that all matter, by name and shape: offsets of about a pixel, no identity."""
    state = {}
    for name, value in model.state_dict().items():
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(value.shape)
        tensor = torch.from_numpy(noise).float()
        if not value.is_floating_point():
            tensor = torch.zeros_like(value)
        elif name.endswith("running_var"):
            tensor = 1 + 0.2 * tensor.abs()
        elif value.ndim > 1:
            tensor = tensor / value[0].numel() ** 0.5
        elif "gamma" in name or "norm" in name and name.endswith("weight"):
            tensor = 0.7 + 0.1 * tensor
        else:
            tensor = 0.2 * tensor
        state[name] = tensor
    return state


def seeded_images(height: int, width: int) -> Tensor:  # [2, 3, height, width] fp32
    noise = np.random.RandomState(0).standard_normal((2, 3, height, width))
    return torch.from_numpy(noise).float()


def digest(state: Mapping[str, Tensor]) -> str:
    """Of names and shapes, in their order."""
    lines = [f"{name} {list(value.shape)}" for name, value in state.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sketch(value: Tensor) -> list[float]:
    """Six numbers that move when any part of a tensor does: its dot product with fixed noise."""
    flat = value.detach().double().flatten()
    noise = np.random.RandomState(1).standard_normal((6, flat.numel()))
    dots = torch.from_numpy(noise) @ flat / flat.numel() ** 0.5
    return [float(f"{dot:.7g}") for dot in dots.tolist()]


def weigh(output: Tensor) -> Tensor:
    """A scalar that every output has another weight in."""
    return (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()


def gradient_norms(model: nn.Module) -> dict[str, float]:
    norms = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
    return {name: float(f"{norm:.7g}") for name, norm in norms.items()}


def import_official(checkout: Path) -> Any:
    """The official model class. Two modules that it imports and does not call here are empty."""
    import timm.layers

    for name in ("DCNv3", "pkg_resources"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["timm.models.layers"] = timm.layers
    sys.path.insert(0, str(checkout / "classification"))
    from models.intern_image import InternImage  # type: ignore[import-not-found]

    return InternImage


def build(official: Any, cfg: InternImageConfig) -> nn.Module:
    ours = (
        "image_size",
        "token_dim",
        "pool_heads",
        "pooled_dim",
        "drop_path_mode",
        "activation_checkpointing",
    )
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(cfg).items()}
    linspace = torch.linspace  # whose values it reads, on the meta device too
    quiet = contextlib.redirect_stdout(io.StringIO())
    on_cpu = mock.patch("torch.linspace", lambda *a, **k: linspace(*a, **{**k, "device": "cpu"}))
    with quiet, on_cpu:
        return official(
            core_op="DCNv3_pytorch", **{k: v for k, v in options.items() if k not in ours}
        )


def outputs(official: Any, cfg: InternImageConfig, image: tuple[int, int]) -> dict[str, Any]:
    model = build(official, cfg).eval()
    model.load_state_dict(seeded_state(model))
    images = seeded_images(*image).requires_grad_()
    logits = model(images)
    weigh(logits).backward()
    found: dict[str, Any] = {
        "logits": sketch(logits),
        "stages": [sketch(x) for x in model.forward_features_seq_out(images)],
        "image_gradient": sketch(images.grad),  # type: ignore[arg-type]
    }
    if sum(cfg.depths) < 10:
        found["gradient_norms"] = gradient_norms(model)
    if cfg.use_clip_projector:
        *_, x3, x4 = (x.permute(0, 3, 1, 2) for x in model.forward_features_seq_out(images))
        tokens = model.dcnv3_head_x4(x4) + model.dcnv3_head_x3(x3)  # type: ignore[operator]
        found["tokens"] = sketch(tokens.flatten(2).transpose(1, 2))
        found["pooled"] = sketch(model.forward_clip_projector(images))  # type: ignore[operator]
    return found


def main(checkout: Path) -> None:
    official = import_official(checkout)
    keys = {}
    for name in NAMES:
        with torch.device("meta"):
            model = build(official, getattr(sizes, f"internimage_{name}")())
        state = model.state_dict()
        count = sum(p.numel() for p in model.parameters())
        keys[name] = {"num_keys": len(state), "parameters": count, "digest": digest(state)}
    golden = {"keys": keys, "cases": {n: outputs(official, *case) for n, case in CASES.items()}}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
