"""Train in a directory and be killed at one of its writes, as a cluster would do it.

    python -m tests.faults.killed_run CONFIG OUT [KILL_AT [power_cut]]

Goes on with the run that is in OUT, if it has a checkpoint, or begins it; without KILL_AT to its
end. Called again and again it comes to that end, if nothing that a kill leaves is in the way.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from m3i_fast.config import TrainConfig
from m3i_fast.engine import checkpoint
from m3i_fast.engine.trainer import Trainer
from tests.faults.files import FaultyFiles


def main(config: Path, out: Path, kill_at: int | None = None, *options: str) -> None:
    resume = bool(checkpoint.checkpoints(out / "checkpoints"))
    if not resume and out.exists():
        shutil.rmtree(out)
    with FaultyFiles(out, kill_at=kill_at, power_cut="power_cut" in options):
        Trainer(TrainConfig.load(config), out, resume=resume).train()


if __name__ == "__main__":
    folders, numbers = map(Path, sys.argv[1:3]), map(int, sys.argv[3:4])
    main(*folders, *numbers, *sys.argv[4:])
