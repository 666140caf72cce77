"""Step counts of Apex's and Transformer Engine's optimisers, kept where a checkpoint saves them.

These optimisers keep one count in each group, which a checkpoint does not hold, so that a resumed
run would correct the bias of its moments from step 1 again. Here the counts are copied to and from
the state of every parameter.
"""

from __future__ import annotations

from typing import Any

import torch


def keep_steps_in_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Read the groups' step counts from the state before a step, and write them back after it."""
    optimizer.register_step_pre_hook(_read)
    optimizer.register_step_post_hook(_write)
    return optimizer


def _read(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        states = (optimizer.state.get(p, {}) for p in group["params"])
        step = next((state["step"] for state in states if "step" in state), None)
        if step is not None:
            group["step"] = int(step)  # a host synchronisation, after a resume alone


def _write(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if state := optimizer.state.get(p):
                state["step"] = torch.tensor(float(group["step"]))
