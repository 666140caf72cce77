"""m3i-fast data index: tars that others wrote become a data set where they lie."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.table import Table
from rich.text import Text

from m3i_fast.cli import console
from m3i_fast.cli.data.pack import Several
from m3i_fast.config.data import CACHE_DIR, MAX_PIXELS
from m3i_fast.config.fields import check_at_least
from m3i_fast.line_files import read_lines
from m3i_fast.terminal import progress_bar

if TYPE_CHECKING:
    from m3i_fast.pipelines.indexing.build import Indexed
    from m3i_fast.pipelines.indexing.contents import Columns
    from m3i_fast.pipelines.indexing.tar_places import Tars

Guessed = Annotated[str, tyro.conf.arg(metavar="auto|none|COLUMN")]
SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Index:
    """Index tars of WebDataset or img2dataset, so that they are trained on where they lie.

    They lie in a folder or a bucket, and stay there: manifest.json, a table a split (.samples) and
    refused.jsonl are written, with every sample that is left out and why. Killed and typed again,
    it goes on after the tars that were finished. Captions are tokenised while loading.
    """

    path: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """Folder with the tars, also in folders below it, or their URL: s3://, gs://."""
    out: Path | None = None
    """Folder for what is written, where DIR is to stay as it is; None: DIR, a bucket too."""
    tars: tuple[str, ...] = ("**/*.tar",)
    """Patterns of the tars to take, relative to DIR or, of a folder, absolute and inside of it."""
    split: str | None = None
    """Split of all tars. None: that in the name of each tar or its folder (train, test,
    heldout, which val is too), train where there is none."""
    caption_column: Guessed = "auto"
    """Where captions are: txt, json:FIELD, or none; auto: what the first samples have."""
    label_column: Guessed = "auto"
    """Where labels are: cls, json:FIELD, or none; numbers, or names of classes."""
    group_column: str | None = None
    """json:FIELD of what near-duplicates share, which are positives of each other; None: no
    groups."""
    column: Annotated[tuple[str, ...], Several] = ()
    """Named column beside caption and label, of the samples' json, as NAME:KIND or
    NAME:KIND=FIELD; may be given several times. Kinds: class; labels, a set; numbers, of which
    there may be several, NAME:numbers=FIELD,FIELD; text; regions, boxes with a text each. A field
    that is null or missing is not known."""
    class_names: Path | None = None
    """Text file with the name of each class on a line of its own, by number."""
    decode: bool = False
    """Decode every picture, and flag those that do not: they keep their place and are not taken.
    Without this headers alone are checked."""
    num_merges: int | None = None
    """Merges of CLIP's byte-pair encoding that captions are tokenised with; None: all, 49,408 token
    ids."""
    context_length: int = 77
    """Most tokens of a caption; longer ones are cut."""
    name: str | None = None
    """Name of the data set; None: the folder's."""
    license: str = "not stated"
    """Licence of the pictures, for the manifest."""
    attribution: str = "not stated"
    """Whom the pictures are by, for the manifest."""
    max_pixels: int = MAX_PIXELS
    """Most pixels of a picture, as data.max_pixels of a run."""
    workers: int = len(os.sched_getaffinity(0))
    """Processes, a tar each at a time; the result does not depend on their number."""

    cache_dir: Path = CACHE_DIR
    """Folder of this machine in which an index is written that goes beside tars in a bucket."""

    def run(self) -> None:
        from m3i_fast.pipelines.indexing.build import check_out, check_split_name
        from m3i_fast.pipelines.packing.items import split_in_name
        from m3i_fast.pipelines.storage.objects import url_of

        check_at_least(self, max_pixels=1, workers=1)
        if self.split is not None:
            check_split_name(self.split)
        url, out_url = url_of(self.path), None if self.out is None else url_of(self.out)
        if out_url is not None:
            raise ValueError(
                f"--out: expected a folder, or nothing for an index beside the tars, got {out_url}"
            )
        place = url if url and self.out is None else str(self.out or self.path)
        if self.out is not None or url is None:
            check_out(self.out or self.path)
        tars, names = self._tars(url)
        splits = {name: self.split or split_in_name(name) or "train" for name in names}
        columns = self._columns(tars, names)
        self._say_guesses(splits, columns)
        total = sum(map(tars.num_bytes, names))
        if url is not None:
            console.print(
                f"{total:,} bytes of {len(names)} tars are read from {url}, each once; up to "
                f"{min(self.workers, len(names))} tars lie on this machine at a time",
                highlight=False,
                soft_wrap=True,
            )
        self._say(self._index(tars, splits, columns, total, url), place)

    def _tars(self, url: str | None) -> tuple[Tars, list[str]]:
        """Find the tars, say which are left out, and look whether an index can be written."""
        from m3i_fast.pipelines.indexing.beside import check_beside
        from m3i_fast.pipelines.indexing.tar_places import BucketTars, TarFolder
        from m3i_fast.pipelines.indexing.tars import find_compressed, find_tars

        if url is not None:
            found = BucketTars(url, self.tars, is_beside=self.out is None)
            if self.out is None:
                check_beside(url)
            self._say_compressed(found.compressed)
            return found, found.names
        if not self.path.is_dir():
            raise FileNotFoundError(f"DIR: expected a folder with tars, got {self.path}")
        names = find_tars(self.path, self.tars)
        self._say_compressed(find_compressed(self.path, self.tars))
        return TarFolder(self.path), names

    def _index(
        self, tars: Tars, splits: dict[str, str], columns: Columns, total: int, url: str | None
    ) -> Indexed:
        """Index the tars, with a bar of their bytes."""
        from m3i_fast.pipelines.indexing.beside import publish, work_folder
        from m3i_fast.pipelines.indexing.build import IndexInfo, index_tars

        info = IndexInfo(
            name=self.name or (url.rpartition("/")[2] if url else self.path.resolve().name),
            licence=self.license,
            attribution=self.attribution,
        )
        is_beside = url is not None and self.out is None
        out = work_folder(url, self.cache_dir) if url and is_beside else self.out or self.path
        with progress_bar("indexing", total, console=console, in_bytes=True) as update:
            seen = 0

            def advance(num_samples: int, num_bytes: int) -> None:
                nonlocal seen
                seen += num_samples
                update(num_bytes, doing=f"indexing {seen:,} samples")

            indexed = index_tars(
                tars,
                splits,
                columns,
                info,
                out=out,
                workers=self.workers,
                advance=advance,
                publish=partial(publish, url) if url and is_beside else lambda out: None,
            )
        if is_beside:
            shutil.rmtree(out)
        return indexed

    def _columns(self, tars: Tars, names: list[str]) -> Columns:
        from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
        from m3i_fast.pipelines.indexing.contents import Columns
        from m3i_fast.pipelines.indexing.tars import guess_columns

        guess = guess_columns(tars, names)
        chosen = {"auto": guess.caption, "none": None}
        labels = {"auto": guess.label, "none": None}
        class_names = None
        if self.class_names is not None:
            class_names = read_lines(self.class_names, "--class-names")
        return Columns(
            caption=chosen.get(self.caption_column, self.caption_column),
            label=labels.get(self.label_column, self.label_column),
            group=self.group_column,
            class_names=class_names,
            max_pixels=self.max_pixels,
            decode=self.decode,
            tokenizer=Tokenizer(self.num_merges, self.context_length).info,
            named=self.column,
        )

    def _say_compressed(self, names: list[str]) -> None:
        from m3i_fast.pipelines.indexing.tar_places import told_compressed

        if told := told_compressed(names):
            console.print(f"left out: {told}", highlight=False, soft_wrap=True, markup=False)

    def _say_guesses(self, splits: dict[str, str], columns: Columns) -> None:
        tars = ", ".join(f"{n} of {split}" for split, n in Counter(splits.values()).items())
        console.print(
            f"tars: {tars} (--split); captions: {columns.caption or 'none'} (--caption-column); "
            f"labels: {columns.label or 'none'} (--label-column); groups: "
            f"{columns.group or 'none'} (--group-column); "
            f"named columns: {', '.join(columns.named) or 'none'} (--column)",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )

    def _say(self, indexed: Indexed, place: str) -> None:
        from m3i_fast.pipelines.packing.readers.named_columns import told

        for name, split in indexed.manifest.splits.items():
            console.print(
                f"{name}: {split.num_samples} pictures in {len(split.shards)} tars, "
                f"{split.num_bad} that do not decode, {split.num_captions} with a caption, "
                f"{split.num_labels} with a label, {split.num_groups} groups",
                highlight=False,
                soft_wrap=True,
            )
            if split.columns is not None:
                known = split.columns.num_known
                console.print(
                    f"{name}: "
                    + ", ".join(
                        f"{told([column])} known of {known[column.name]}"
                        for column in indexed.manifest.columns
                    ),
                    highlight=False,
                    soft_wrap=True,
                    markup=False,
                )
        for name in indexed.empty_splits:
            console.print(
                f"{name}: left out, since no picture of it can be used",
                highlight=False,
                soft_wrap=True,
                markup=False,
            )
        if indexed.reasons:
            table = Table("left out", "why", title=Text(f"named in {place}/refused.jsonl"))
            for reason, number in indexed.reasons.most_common(SHOWN):
                table.add_row(str(number), Text(reason))
            console.print(table)
        console.print(f"wrote {place}", soft_wrap=True)
