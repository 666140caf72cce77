"""A small folder of what `load` reads of a run: config, record of its data, weights in one file."""

from __future__ import annotations

from pathlib import Path

from m3i_fast.config import TrainConfig
from m3i_fast.config.objective.targets import ANSWERS
from m3i_fast.config.run_encoder import PREFIXES
from m3i_fast.durable_files import created_whole
from m3i_fast.export.weight_files import WEIGHTS, write_weights
from m3i_fast.inference.loading import data_record, find_weights


def save_folder(run: Path, out: Path, *, data: Path | None = None) -> None:
    """Write the encoder, its moving average and the heads of annotations of a run to a new folder.

    run, data: as `load` takes them. After an error there is no folder. Raises as `load`, ValueError
    where a run of an older version lacks its data, and FileExistsError.
    """
    stored = find_weights(run)
    cfg = TrainConfig.load(stored.directory / "config.json")
    record = data_record(stored, cfg, data)
    terms = [term.name for term in cfg.objective.active_terms if term.target in ANSWERS]
    prefixes = (*PREFIXES.values(), *(f"terms.{name}." for name in terms))
    with created_whole(out) as folder:
        write_weights(folder / WEIGHTS, stored.weights.read(prefixes))
        record.save(folder)
        cfg.save(folder / "config.json")
