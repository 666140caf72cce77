"""FLOPs of every recipe at its full size in closed form against torch's counter; no memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from m3i_fast.costs.step_flops import step_flops, without_sampling
from m3i_fast.objectives.mixing import Mix
from m3i_fast.planning.step_memory import (
    build_on_meta,
    draw_first_mix,
    empty_batch,
    largest_batch,
)
from m3i_fast.recipes import recipes
from tests.shared.flop_formulas import FORMULAS

# Those of a frozen teacher, whose size is in no recipe, are in test_step_flops.py.
NAMES = [name for name, make in recipes().items() if not make().objective.uses(encoder="frozen")]
QUICK = {"m3i_vit_h", "m3i_internimage_t", "dinov3_vit_b_gram"}  # the others take three minutes


CASES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.nightly]) for name in NAMES]


class AsIfSo(TorchDispatchMode):
    """A number that is asked of a tensor without values is 1: every caption and label is there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_at_its_full_size(name: str) -> None:
    # Of views of any shape the largest batch, whose squares are a case of it.
    cfg = replace(largest_batch(recipes()[name]()), compile=False)
    mix, objective = draw_first_mix(cfg), build_on_meta(cfg).train()
    with FakeTensorMode() as fake:
        objective._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
        values = {name: getattr(mix, name) for name in mix.__slots__}
        mix = Mix(
            **{k: fake.from_tensor(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        )
        batch = empty_batch(cfg)
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter, AsIfSo():
            targets = objective.encode_targets(batch, mix)
            encoded = objective.encode_inputs(batch, mix)
            loss, _ = objective(encoded, targets, batch, mix)
            loss.backward()
    found = without_sampling(step_flops(cfg))
    assert found.hardware == pytest.approx(counter.get_total_flops(), rel=0.01)
