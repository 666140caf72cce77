"""A copy of a data set with a column of regions, for what trains on them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from m3i_fast.pipelines.dataset.annotations.columns import ColumnInfo, rows_of, write_columns
from m3i_fast.pipelines.dataset.manifest import MANIFEST_NAME, read_manifest

COLUMN = ColumnInfo(name="regions", kind="regions", size=2)


def with_regions(dataset: Path, out: Path) -> Path:
    """Copy a packed data set, and give every sample two, one, none or no known regions."""
    shutil.copytree(dataset, out)
    manifest = read_manifest(out)
    splits = {}
    for name, split in manifest.splits.items():
        values: list[dict[str, Any]] = []
        for i in range(split.num_samples):
            corner = (i % 7) / 20
            region = (corner, corner / 2, corner + 0.5, corner / 2 + 0.6), [1, 2 + i % 9, 3]
            values.append({} if i % 4 == 3 else {"regions": [region] * (2 - i % 4)})
        rows = [rows_of([COLUMN], values)]
        splits[name] = replace(
            split, columns=write_columns(out / f"{name}.columns", [COLUMN], rows)
        )
    told = replace(manifest, splits=splits, columns=(COLUMN,))
    (out / MANIFEST_NAME).write_text(told.to_json())
    return out
