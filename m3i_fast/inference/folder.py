"""A small folder of what `load` reads of a run: config, record of its data, weights in one file."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

from m3i_fast.config import TrainConfig
from m3i_fast.config.objective import LABELS
from m3i_fast.durable_files import replaced_atomically
from m3i_fast.inference.loading import PREFIXES, WEIGHTS, data_record, find_weights


def save_folder(run: Path, out: Path) -> None:
    """Write the encoder, its moving average and the heads of labels of a run to a new folder.

    run: as `load` takes it. The config is written last: without it `load` takes no folder. Raises
    as `load`, ValueError where a run of an older version lacks its data, and FileExistsError.
    """
    stored, directory = find_weights(run)
    cfg = TrainConfig.load(directory / "config.json")
    record = data_record(directory, cfg)
    terms = [term.name for term in cfg.objective.active_terms if term.target in LABELS]
    prefixes = (*PREFIXES.values(), *(f"terms.{name}." for name in terms))
    weights = {
        name: torch.empty(size, dtype=stored.dtypes[name])
        for name, size in stored.sizes.items()
        if name.startswith(prefixes)
    }
    stored.read_into(weights)
    out.mkdir(parents=True)
    with replaced_atomically(out / WEIGHTS) as temporary:
        safetensors.torch.save_file(weights, temporary, metadata={"format": "pt"})
    record.save(out)
    cfg.save(out / "config.json")
