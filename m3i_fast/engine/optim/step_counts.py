"""Step counts where a checkpoint looks for them: in the state of every parameter.

Apex's and Transformer Engine's optimisers keep one in each group, so that a resumed run would
correct the bias of its moments from step 1 again.
"""

from __future__ import annotations

from typing import Any

import torch


def keep_steps_in_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Before each step the groups' counts are read from the state, and written there after it."""
    optimizer.register_step_pre_hook(_read)
    optimizer.register_step_post_hook(_write)
    return optimizer


def _read(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        states = (optimizer.state.get(p, {}) for p in group["params"])
        step = next((state["step"] for state in states if "step" in state), None)
        if step is not None:
            group["step"] = int(step)  # waits for the device after a resume, as it is loaded there


def _write(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if state := optimizer.state.get(p):
                state["step"] = torch.tensor(float(group["step"]))
