"""Names, keywords and values that we pass to Transformer Engine, taken by its real code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformer_engine.pytorch as te
from torch import nn
from torch.overrides import TorchFunctionMode
from transformer_engine.common import recipe as recipes
from transformer_engine.pytorch import distributed
from transformer_engine.pytorch.optimizers import FusedAdam
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.config.optim import OptimConfig
from m3i_fast.engine.optim.optimizers import build_optimizer
from m3i_fast.models import ViT
from m3i_fast.models.transformer import te_layers
from m3i_fast.models.transformer.te_layers import (
    te_autocast,
    te_checkpoint,
    te_recipe,
    te_unavailable,
)
from scripts.te_contract import release

CFG = ViTConfig(image_size=32, patch_size=8, dim=32, depth=2, num_heads=2)


def test_the_release_is_the_one_that_pyproject_names() -> None:
    assert te.__name__ and __import__("transformer_engine").__version__.startswith(release())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fp8_current", recipes.Float8CurrentScaling),
        ("fp8_delayed", recipes.DelayedScaling),
        ("fp8_block", recipes.Float8BlockScaling),
        ("mxfp8", recipes.MXFP8BlockScaling),
    ],
)
def test_recipes_are_of_the_kind_that_they_name(name: Any, kind: type) -> None:
    recipe = te_recipe(name)
    assert type(recipe) is kind
    assert not recipe.fp8_dpa and not recipe.fp8_mha  # attention stays in bf16
    if name == "fp8_delayed":
        assert not recipe.reduce_amax  # or no module could run twice in a region


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="recipe: expected one of fp8_current, .*, got 'fp4'"):
        te_recipe("fp4")  # type: ignore[arg-type]


def test_the_recipe_is_the_one_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where products stay in bf16: Transformer Engine's own choice is never asked for."""

    def chosen() -> None:
        raise AssertionError("the default recipe was asked for")

    monkeypatch.setattr(te.quantization, "get_default_fp8_recipe", chosen)
    for recipe in (None, te_recipe("fp8_current"), te_recipe("fp8_delayed")):
        with te_autocast(recipe):
            assert FP8GlobalStateManager.is_fp8_enabled() == (recipe is not None)
            if recipe is not None:
                assert FP8GlobalStateManager.get_fp8_recipe() is recipe
        assert not FP8GlobalStateManager.is_fp8_enabled()


def test_what_a_hopper_can_is_asked_by_name() -> None:
    assert te_unavailable("fp8_current") is None
    reason = te_unavailable("mxfp8")
    assert reason is not None and "10.0" in reason


def test_checkpointing_takes_our_keywords_and_runs_the_block_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Transformer Engine's own, around a block that runs on a CPU."""
    # There is no device whose generator it could keep.
    monkeypatch.setattr(distributed, "_get_cuda_rng_state", lambda **_: None)
    monkeypatch.setattr(distributed, "_set_cuda_rng_state", lambda *_, **__: None)
    run = te_checkpoint("full")
    assert run is not None and te_checkpoint("none") is None
    calls = []
    layer = nn.Linear(4, 4)

    def function(x: torch.Tensor, key_mask: None, num_last: None) -> torch.Tensor:
        calls.append(x)
        return layer(x).tanh()

    x = torch.randn(3, 4, requires_grad=True)
    run(function, x, None, None).square().sum().backward()
    got, x.grad = x.grad, None
    function(x, None, None).square().sum().backward()
    assert len(calls) == 3
    assert torch.equal(got, x.grad)


def test_selective_recomputation_is_refused_by_name() -> None:
    cfg = ViTConfig(image_size=32, patch_size=8, dim=32, depth=1, num_heads=2,
                    activation_checkpointing="selective")  # fmt: skip
    with pytest.raises(ValueError, match="activation_checkpointing: expected none or full"):
        ViT(cfg, layers=te_layers.te_layers())


class OnCpu(TorchFunctionMode):
    """Makes on the CPU what is asked for on the device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "cpu"} if "device" in kwargs else kwargs))


def test_fused_adam_is_constructed_as_the_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3i_fast.engine.optim.optimizers._expect_usable", lambda *_: None)
    with OnCpu():
        optimizer = build_optimizer(OptimConfig(impl="te", eps=1e-7), ViT(CFG))
    (part,) = optimizer.optimizers
    assert isinstance(part, FusedAdam)
    group = part.param_groups[0]
    assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-7 and group["bias_correction"]
    assert part.adam_w_mode
