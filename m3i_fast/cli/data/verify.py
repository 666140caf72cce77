"""m3i-fast data verify: every byte of a data set is read, and every fault is listed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.table import Table
from rich.text import Text

from m3i_fast.cli import console
from m3i_fast.config.data import MAX_PIXELS


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Read every byte of a data set, and compare it with checksums, digests and counts.

    Every sample whose bytes were changed, and what else training would stop at, is named.
    """

    path: tyro.conf.Positional[Path]
    """Dataset directory."""
    decode: bool = False
    """Decode every picture; without this their headers alone are looked at."""
    max_pixels: int = MAX_PIXELS
    """Most pixels of a picture, as data.max_pixels of a run."""
    max_faults: int = 100
    """Most faults to list; all are counted."""

    def run(self) -> None:
        from m3i_fast.pipelines.dataset.manifest import how_to_restore
        from m3i_fast.pipelines.dataset.verify import find_faults
        from m3i_fast.pipelines.storage.objects import check_folder

        check_folder(self.path)
        report = find_faults(self.path, decode=self.decode, max_pixels=self.max_pixels)
        manifest, faults = report.manifest, report.faults
        if faults:
            table = Table("file", "sample", "what is wrong", title=Text(str(self.path)))
            for fault in faults[: self.max_faults]:
                reason = fault.reason.removeprefix(f"{self.path / fault.where}: ")
                row = (fault.where, fault.sample or "", reason)
                table.add_row(*(Text(text, overflow="fold") for text in row))
            console.print(table)
            left = len(faults) - self.max_faults
            more = f" ({left} not listed: --max-faults)" if left > 0 else ""
            raise ValueError(
                f"{self.path}: {len(faults)} faults{more}; {how_to_restore(self.path, manifest)}"
            )
        console.print(f"{self.path}: good", soft_wrap=True)
        for name, split in manifest.splits.items():
            console.print(
                f"  {name}: {split.num_samples} pictures in {split.num_groups} groups, "
                f"{split.num_captions} with a caption ({split.total_captions} captions, at most "
                f"{split.max_captions} a picture), {split.num_labels} with a label",
                highlight=False,
                soft_wrap=True,
            )
