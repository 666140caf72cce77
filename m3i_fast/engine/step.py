"""The forward pass of one training step as a module, so that ranks reduce its gradients."""

from __future__ import annotations

from torch import Tensor, nn

from m3i_fast.objectives.mixing import Mix
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.step_context import Stage
from m3i_fast.pipelines.batch import Batch


class StepForward(nn.Module):
    """Targets, inputs, objective."""

    def __init__(self, objective: MutualInformation) -> None:
        super().__init__()
        self.objective = objective

    def forward(
        self, batch: Batch, mix: Mix, stage: Stage, *, monitor: bool, measure: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the metrics of `MutualInformation`, each part in its stage."""
        with stage("fwd.target"):
            targets = self.objective.encode_targets(batch, mix)
        with stage("fwd.input"):
            encoded = self.objective.encode_inputs(batch, mix)
        return self.objective(
            encoded, targets, batch, mix, monitor=monitor, measure=measure, stage=stage
        )
