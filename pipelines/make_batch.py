"""A batch of what a backend made: views beside the labels, captions and columns of their rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from m3i_fast.config.columns import NO_CLASS
from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.batch_rows import BatchRows
from m3i_fast.pipelines.dataset.annotations.regions import RegionViews
from m3i_fast.pipelines.opened.mixed_table import MixedTable
from m3i_fast.pipelines.opened.open_data import OpenSplit
from m3i_fast.pipelines.samples_to_views import MadeBatch, SampleError


def _wrong_row(rows: BatchRows, index: int, opened: OpenSplit) -> SampleError:
    """Return the error for a sample of a label or an id that cannot be, as its table has it."""
    table, number = opened.table, rows.samples[index : index + 1]
    num_classes, ids = len(opened.manifest.class_names), "at least 0"
    if isinstance(table, MixedTable):
        ((dataset,), number) = table.mixed.split_rows(number)
        num_classes = len(table.mixed.manifests[dataset].class_names)
        table, ids = table.tables[dataset], "0 to 2**48 - 1 in a mixture"
    (row,) = table.at(number)
    return SampleError(
        sample_id=int(row["sample_id"]),
        position=int(rows.positions[index]),
        file=rows.path(index),
        reason=f"expected a label from -1 to {num_classes - 1} and ids of {ids}, got label "
        f"{row['label']}, sample {row['sample_id']} of group {row['group_id']}",
    )


def expect_allowed(rows: BatchRows, opened: OpenSplit) -> None:
    """Raise SampleError for a sample whose label or group the manifest does not allow."""
    num_classes = len(opened.manifest.class_names)
    wrong = (rows.label < -1) | (rows.label >= num_classes) | (rows.sample_id < 0)
    wrong |= rows.group_id < 0
    if wrong.any():
        raise _wrong_row(rows, int(np.flatnonzero(wrong)[0]), opened)


def to_batch(
    made: MadeBatch, opened: OpenSplit, cfg: LoaderConfig, num_global: int, device_id: int | None
) -> Batch:
    """Make a `Batch` of what a backend made, on a GPU where one is given.

    Raises SampleError as `expect_allowed`.
    """
    expect_allowed(made.rows, opened)
    batch = Batch(
        global_views=made.views[:num_global],
        local_views=made.views[num_global:],
        **fields_beside_views(made, opened, cfg),
    )
    return batch if device_id is None else batch.to(f"cuda:{device_id}")


def cuts_alternates(cfg: LoaderConfig, opened: OpenSplit) -> bool:
    """Return whether view 1 is cut of another picture of the sample."""
    several = cfg.augment and cfg.global_views.count > 1
    return cfg.alternates and several and opened.split.max_alternates > 0


def fields_beside_views(made: MadeBatch, opened: OpenSplit, cfg: LoaderConfig) -> dict[str, Any]:
    """Return the fields of a batch that do not depend on the shape of its views, by name."""
    rows = made.rows
    columns = dict(rows.columns)
    shown = RegionViews(most=cfg.max_regions, least_share=cfg.min_region_share, seed=cfg.seed)
    for column in opened.described.columns:
        if column.kind == "regions":
            columns[column.name] = shown.of(
                columns[column.name], made.params.numpy(), made.image_size.numpy(), rows.positions
            )
            if cuts_alternates(cfg, opened):  # whose regions are not known
                columns[column.name][:, 1] = NO_CLASS
    return {
        "boxes": made.params[:, :, :5].contiguous(),
        "image_size": made.image_size.float(),
        "token_ids": made.token_ids,
        "num_tokens": made.num_tokens,
        "label": torch.from_numpy(rows.label),
        "sample_id": torch.from_numpy(rows.sample_id.copy()),
        "group_id": torch.from_numpy(rows.group_id),
        "position": torch.from_numpy(rows.positions.copy()),
        "columns": {name: torch.from_numpy(values) for name, values in columns.items()},
    }
