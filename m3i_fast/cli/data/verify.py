"""m3i-fast data verify: every byte of a data set is read, and every fault is listed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.table import Table
from rich.text import Text

from m3i_fast.cli import console
from m3i_fast.config.data import CACHE_DIR, MAX_PIXELS
from m3i_fast.config.fields import check_at_least
from m3i_fast.terminal import progress_bar

if TYPE_CHECKING:
    from m3i_fast.pipelines.dataset.files import DatasetFiles
    from m3i_fast.pipelines.dataset.verification.verify import Report


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Read every byte of a data set, and compare it with checksums, digests and counts.

    Every sample whose bytes were changed, and what else training would stop at, is named. Of a
    bucket the shards are read one after the other, and at most 80 MiB of them are in memory.
    """

    path: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DATASET")]]
    """Dataset directory, or its URL in object storage."""
    decode: bool = False
    """Decode every picture; without this their headers alone are looked at."""
    max_pixels: int = MAX_PIXELS
    """Most pixels of a picture, as data.max_pixels of a run."""
    max_faults: int = 100
    """Most faults to list; all are counted."""
    cache_dir: Path = CACHE_DIR
    """Folder of this machine for a bucket's tables, which are removed at the end."""

    def run(self) -> None:
        check_at_least(self, max_pixels=1, max_faults=0)
        from m3i_fast.pipelines.storage.remote_files import opened_files

        with opened_files(self.path, self.cache_dir, anew=True) as files:
            report = self._read(files)
            self._say(files, report)

    def _read(self, files: DatasetFiles) -> Report:
        from m3i_fast.pipelines.dataset.verification.verify import find_faults

        splits = files.manifest.splits.values()
        total = sum(shard.num_bytes for split in splits for shard in split.shards)
        with progress_bar("verifying", total, console=console, in_bytes=True) as update:
            return find_faults(
                files, decode=self.decode, max_pixels=self.max_pixels, advance=update
            )

    def _say(self, files: DatasetFiles, report: Report) -> None:
        faults = report.faults
        if faults:
            table = Table("file", "sample", "what is wrong", title=Text(files.place))
            for fault in faults[: self.max_faults]:
                reason = fault.reason.removeprefix(f"{files.place}/{fault.where}: ")
                row = (fault.where, fault.sample or "", reason)
                table.add_row(*(Text(text, overflow="fold") for text in row))
            console.print(table)
            left = len(faults) - self.max_faults
            more = f" ({left} not listed: --max-faults)" if left > 0 else ""
            raise ValueError(f"{files.place}: {len(faults)} faults{more}; {files.restore}")
        console.print(f"{files.place}: good", soft_wrap=True)
        for name, split in report.manifest.splits.items():
            console.print(
                f"  {name}: {split.num_samples} pictures in {split.num_groups} groups, "
                f"{split.num_captions} with a caption ({split.total_captions} captions, at most "
                f"{split.max_captions} a picture), {split.num_labels} with a label",
                highlight=False,
                soft_wrap=True,
            )
