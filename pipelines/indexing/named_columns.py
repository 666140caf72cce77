"""Named columns of tars that others wrote: fields of their json, a file of rows a split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m3i_fast.pipelines.dataset.annotations.columns import (
    COLUMNS_SUFFIX,
    ColumnInfo,
    rows_of,
    write_columns,
)
from m3i_fast.pipelines.dataset.manifest import Manifest
from m3i_fast.pipelines.indexing.contents import Columns
from m3i_fast.pipelines.indexing.tar_task import TarTask, read_named
from m3i_fast.pipelines.packing.items import Refused
from m3i_fast.pipelines.packing.readers.named_columns import Described, describe, with_context


def with_columns(
    manifest: Manifest, columns: Columns, tasks: Mapping[str, TarTask], folder: Path
) -> Manifest:
    """Write the named columns of each split to a file in `folder`, and return their manifest.

    tasks: of each tar, by its name; they are done, and their results are read one at a time. Raises
    ValueError where nothing is known of a column, or a sample has another count of numbers.
    """
    if not columns.named:
        return manifest
    described = describe(
        columns.specs, (values for task in tasks.values() for values in read_named(task))
    )
    infos = with_context([each.column for each in described], columns.tokenizer.context_length)
    splits = {}
    for name, split in manifest.splits.items():
        parts = (_rows(tasks[shard.file], described, infos) for shard in split.shards)
        written = write_columns(folder / f"{name}{COLUMNS_SUFFIX}", infos, parts)
        splits[name] = replace(split, columns=written)
    return replace(manifest, splits=splits, columns=infos)


def _rows(
    task: TarTask, described: Sequence[Described], infos: Sequence[ColumnInfo]
) -> NDArray[np.void]:
    rows = []
    for number, values in enumerate(read_named(task)):
        try:
            rows.append({d.column.name: d.row_of(values.get(d.column.name)) for d in described})
        except Refused as refused:
            raise ValueError(
                f"--column: {task.tar.place}: sample {number}: {refused}, as the sample with most "
                "has them: mend its json, or name several fields of one number each"
            ) from None
    return rows_of(infos, rows)
