"""The code of its own that a folder for transformers brings computes what our encoders do."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from m3i_fast.config.models.internimage import internimage_demo
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.export.huggingface.own_model import code, own_model
from m3i_fast.export.huggingface.save import save_folder
from m3i_fast.models.internimage.model import InternImage
from m3i_fast.models.transformer.vit import ViT

SMALL = ViTConfig(image_size=32, patch_size=8, dim=48, depth=2, num_heads=2)


def by_its_code(model: ViT | InternImage, folder: Path, **options: Any) -> Any:
    """The model as transformers loads it from a folder with code; all of its weights are taken."""
    config, weights = own_model(model, None)
    save_folder(folder / "out", config=config, weights=weights, files=code())
    theirs, said = AutoModel.from_pretrained(
        folder / "out", trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(said.values()), said
    return theirs


@pytest.mark.parametrize(
    "cfg",
    [
        replace(SMALL, final_norm=False, class_token=True, num_registers=2, layer_scale_init=0.1),
        replace(SMALL, position="rotary", key_bias=False, norm_eps=1e-5),
        replace(SMALL, mlp="swiglu", qkv_bias=False),
    ],
)
def test_encoders_that_no_class_computes_bring_their_code(cfg: ViTConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = ViT(cfg).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    theirs = by_its_code(vit, tmp_path)

    def difference(images: Tensor) -> float:
        with torch.no_grad():
            return float((theirs(images).last_hidden_state - vit(images)).abs().max())

    assert difference(torch.randn(2, 3, 32, 32)) < 1e-5
    assert difference(torch.randn(1, 3, 24, 48)) < 1e-5
    with pytest.raises(ValueError, match="expected a model with a text encoder"):
        theirs.get_text_features(torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer_scale": 1e-5, "post_norm": True, "offset_scale": 2.0},
        {
            **{"res_post_norm": True, "center_feature_scale": True, "dw_kernel_size": 5},
            **{"level2_post_norm": True, "level2_post_norm_block_ids": (1,)},
        },
    ],
)
def test_internimages_of_all_kinds_are_computed_in_plain_torch(
    options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    cfg = internimage_demo(image_size=64, channels=16, token_dim=32, pooled_dim=24, **options)
    ours = InternImage(cfg).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs = by_its_code(ours, tmp_path)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        tokens = theirs(images).last_hidden_state
        torch.testing.assert_close(tokens, ours.encode_cells(images), rtol=0, atol=1e-4)
        summary = theirs.encoder.summarise(tokens)
        torch.testing.assert_close(summary, ours.pool(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_internimage_in_halves_errs_as_ours_does(dtype: torch.dtype, tmp_path: Path) -> None:
    """Of a wide picture, in which a half has too few numbers for the places of samples."""
    torch.manual_seed(0)
    cfg = internimage_demo(image_size=64, channels=16, token_dim=32, pooled_dim=24)
    ours = InternImage(cfg).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs = by_its_code(ours, tmp_path, dtype=dtype)
    images = torch.randn(2, 3, 64, 2048)
    with torch.no_grad():
        expected = ours.encode_cells(images)
        got = theirs(images.to(dtype)).last_hidden_state
        own = ours.to(dtype).encode_cells(images.to(dtype))
    assert got.dtype == dtype
    error, own_error = (float((x.float() - expected).norm() / expected.norm()) for x in (got, own))
    assert error <= 1.25 * own_error, (error, own_error)


def test_the_code_of_a_folder_needs_torch_and_transformers_alone() -> None:
    import ast

    nodes = [node for source in code().values() for node in ast.walk(ast.parse(source))]
    names = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    absolute = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.level == 0]
    roots = {name.split(".")[0] for name in names | {str(n.module) for n in absolute}}
    assert roots - {*sys.stdlib_module_names} == {"torch", "transformers"}
    local = {f"{n.module}.py" for n in nodes if isinstance(n, ast.ImportFrom) and n.level}
    assert local == code().keys() - {"modeling_m3i.py"}


def test_the_code_of_a_folder_names_its_licence() -> None:
    for name, source in code().items():
        assert source.startswith(b"# SPDX-License-Identifier: Apache-2.0\n"), name
