"""Evaluations as they lie in their folders: results.json, rows.json and arrays."""

from __future__ import annotations

import logging
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from m3i_fast.json_files import read_json
from m3i_fast.report.inputs import DataEvaluation, Picture

logger = logging.getLogger(__name__)


def read_evaluation(folder: Path) -> DataEvaluation:
    """Read what an evaluation left; FileNotFoundError and ValueError where it is not whole."""
    results = read_json(folder / "results.json", {"data": dict, "encoders": list})
    rows = read_json(folder / "rows.json", {"names": list, "classes": list})
    encoders = range(len(results["encoders"]))
    return DataEvaluation(
        name=folder.name,
        results=results,
        class_names=rows["classes"],
        label=np.array(rows["labels"], np.int64) if "labels" in rows else None,
        pictures=_pictures(folder, rows),
        picture_names=_names(rows),
        arrays=[_arrays(folder, number) for number in encoders],
    )


def evaluations_of(run: Path) -> list[DataEvaluation]:
    """Return the evaluations in a run's directory by name, with a warning for a damaged one."""
    found = []
    for file in sorted(run.glob("evaluation*/results.json")):
        try:
            found.append(read_evaluation(file.parent))
        except (OSError, ValueError) as error:
            logger.warning("%s; the evaluation is left out", error)
    return found


def _pictures(folder: Path, rows: Any) -> dict[int, Picture]:
    if "pictures" not in rows:
        return {}
    pictures = np.load(folder / "pictures.npy", allow_pickle=False)  # [n, 3, S, S]
    pairs = zip(rows["pictures"], pictures, strict=True)
    return {row: np.ascontiguousarray(picture.transpose(1, 2, 0)) for row, picture in pairs}


def _names(rows: Any) -> dict[int, str]:
    pairs = zip(rows.get("pictures", ()), rows.get("captions", ()), strict=True)
    return {row: caption or PurePosixPath(rows["names"][row]).name for row, caption in pairs}


def _arrays(folder: Path, number: int) -> dict[str, npt.NDArray[Any]]:
    files = folder.glob(f"{number}_*/*.npy")
    return {file.stem: np.load(file, allow_pickle=False) for file in files}
