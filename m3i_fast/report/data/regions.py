"""Regions of pictures and of their views, as the page of a data set draws them.

Legend: W integers of a region (`pipelines.dataset.annotations.regions`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.annotations.regions import RegionViews, region_values
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.manifest import Manifest
from m3i_fast.pipelines.dataset.sample_table import SampleTable
from m3i_fast.pipelines.opened.open_data import OpenSplit
from m3i_fast.report.inputs import ShownRegion


class ShownRegions:
    """The regions of pictures and of their views, of the first column of regions, if any."""

    def __init__(self, manifest: Manifest, opened: OpenSplit, tokenizer: Tokenizer) -> None:
        names = [column.name for column in manifest.columns if column.kind == "regions"]
        self._name = names[0] if names else None
        self._opened, self._tokenizer = opened, tokenizer

    def of_picture(self, sample_id: int) -> list[ShownRegion]:
        """Return a sample's regions in their order."""
        if self._name is None:
            return []
        rows = self._rows(self._name, sample_id)
        return [self._shown(row, number) for number, row in enumerate(rows, 1)]

    def of_view(self, batch: Batch, row: int, view: int) -> list[ShownRegion]:
        """Return the regions that a view has, with the numbers that they have in the picture."""
        if self._name is None:
            return []
        of_picture = self._rows(self._name, int(batch.sample_id[row]))
        numbered = of_picture.copy()[None]
        numbered[0, :, 4] = np.arange(len(of_picture))  # in the place of a text
        every = RegionViews(most=max(len(of_picture), 1), least_share=1e-9, seed=0)
        box = batch.boxes[row, view].numpy()[None, None]
        size = batch.image_size[row].long().numpy()[None]
        ((candidates,),) = every.of(numbered, box, size, np.zeros(1, np.int64))
        found = []
        shown = batch.columns[self._name][row, view].numpy()
        for region in shown[shown[:, 4] >= 0]:
            same = (candidates[:, :4] == region[:4]).all(1) & (candidates[:, 4] >= 0)
            same &= (of_picture[candidates[:, 4], 4:] == region[4:]).all(1)
            found.append(self._shown(region, 1 + int(candidates[np.argmax(same), 4])))
        return found

    def _rows(self, name: str, sample_id: int) -> npt.NDArray[np.int32]:  # [regions, W]
        table = self._opened.table
        assert isinstance(table, SampleTable)  # one data set
        numbers = np.flatnonzero(table.rows["sample_id"] == sample_id)
        rows: npt.NDArray[np.int32] = table.columns_at(numbers)[name][0]
        return rows[rows[:, 4] >= 0]

    def _shown(self, row: Any, number: int) -> ShownRegion:  # [W] int32
        ((box, ids),) = region_values(row[None])
        top, left, bottom, right = box
        return ShownRegion(
            top=top,
            left=left,
            bottom=bottom,
            right=right,
            text=self._tokenizer.decode(np.array(ids, np.int32)),
            number=number,
        )
