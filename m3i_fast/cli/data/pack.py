"""m3i-fast data pack: pictures of a user become shards."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import tyro
from rich.table import Table
from rich.text import Text

from m3i_fast.cli import console
from m3i_fast.config.data import CACHE_DIR, MAX_PIXELS
from m3i_fast.config.fields import check_at_least
from m3i_fast.line_files import read_lines

if TYPE_CHECKING:
    from m3i_fast.pipelines.dataset.manifest import Manifest
    from m3i_fast.pipelines.packing.items import Refusal
    from m3i_fast.pipelines.packing.job import Packed, PackSettings
    from m3i_fast.pipelines.packing.workers import Run

Kind = Literal[
    "auto", "imagefolder", "folder", "table", "tars", "huggingface", "packed", "torchvision"
]
Several = tyro.conf.UseAppendAction


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Pack pictures of your own: folders, a table, tars, a Hugging Face or torchvision data set.

    What SOURCE is, and which columns hold what, is guessed and printed. Every picture is decoded
    once; what cannot be used is left out and named in refused.jsonl with what to do. Killed and
    typed again, it goes on where it was; the bytes do not depend on --workers. Into a bucket each
    shard is uploaded when it is done: no more than one a process lies on this machine.
    """

    source: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SOURCE")]]
    """Folder, .csv, .tsv, .jsonl, .parquet or .tar."""
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """Directory to write, or its URL as s3://bucket/folder or gs://bucket/folder."""
    kind: Kind = "auto"
    """What SOURCE is. imagefolder: a folder a class, also below train and val. packed: written by
    m3i-fast data, whose captions, classes, groups and columns it says."""
    image_column: str | None = None
    """Column with the path or the bytes of a picture; of tars its extension."""
    caption_column: Annotated[tuple[str, ...], Several] = ()
    """Column of captions; may be given several times. '' for none. Of pictures in folders txt, the
    text of a picture's name, which is the default where texts lie beside pictures."""
    json_caption: Annotated[tuple[str, ...], Several] = ()
    """Field of a tar's json files that holds a caption; may be given several times."""
    label_column: str | None = None
    """Column (of tars: field of json) of the class, by name or index. '' for none."""
    label_as: Literal["auto", "name", "index"] = "auto"
    """What labels are; auto: indices where all are whole numbers."""
    class_names: Path | None = None
    """Text file with the name of each class on a line of its own, by index."""
    column: Annotated[tuple[str, ...], Several] = ()
    """Named column beside class and captions, as NAME:KIND or NAME:KIND=COLUMN; may be given
    several times. Kinds: class; labels, a set, in a text table with ; between them; numbers, of
    which there may be several, NAME:numbers=COLUMN,COLUMN; text; regions, boxes with a text each,
    also of a file beside the pictures, NAME:regions=FILE.json or .jsonl. An empty cell is not
    known."""
    class_share: Annotated[tuple[str, ...], Several] = ()
    """Column of kind class, as NAME=SHARE, that has the class of a share of each class's pictures,
    split by split, drawn by the seed: a larger share contains a smaller one. May be given several
    times; the class itself stays whole, for probes."""
    group_column: str | None = None
    """Column of groups of near-duplicates, which are positives of each other and in one split."""
    group_near_duplicates: int | None = None
    """Put pictures of a split that are nearly equal into one group: those whose perceptual hashes
    (64 bits) differ in at most so many bits, 0 to 10; 4 finds copies that were scaled or encoded
    again. Every picture is decoded once more."""
    split_column: str | None = None
    """Column with the name of each picture's split."""
    image_root: Path | None = None
    """Folder that paths of a table are relative to; without this that of the table."""
    delimiter: str | None = None
    """What ends a cell of a text table; guessed by its first line."""
    merge_rows: bool = False
    """Take rows of a table that name the same picture for its captions, where they are refused
    otherwise."""
    allow_outside: bool = False
    """Take pictures that paths or symbolic links lead to outside of SOURCE."""
    max_unpacked_gib: float | None = None
    """Most GiB that a compressed tar or a Parquet file may unpack to; none: 1, or 100 times the
    file if that is more."""
    torchvision_class: str | None = None
    """Class of torchvision.datasets, such as CIFAR10."""
    split: Annotated[tuple[str, ...], Several] = ()
    """NAME keeps that split of SOURCE, or names the only one; NAME=SHARE takes a share of the
    training pictures, group by group. May be given several times."""
    limit: int | None = None
    """Take that many pictures, drawn by the seed."""
    seed: int = 0
    """Seed of order, limit and shares."""
    samples_per_shard: int = 4096
    """Pictures of a shard."""
    workers: int | None = None
    """Processes; None: as many as this process has cores."""
    ray: str | None = None
    """Address of a Ray cluster that packs in place of processes; 'local' starts one here."""
    cache_dir: Path = CACHE_DIR
    """Folder of this machine for the shards that are on their way to a bucket, and for copies of
    Parquet and compressed tars; with --ray of these one that all nodes see."""
    for_gpu: int | None = None
    """Encode every picture as baseline JPEG (4:2:0, quality 90), scaled down to this short side:
    what a GPU's hardware decoder takes."""
    max_pixels: int = MAX_PIXELS
    """Most pixels of a picture, as data.max_pixels of a run."""
    long_captions: Literal["cut", "refuse"] = "cut"
    """What is done with captions that are longer than the context: cut, as CLIP does."""
    num_merges: int | None = None
    """Merges of CLIP's byte-pair encoding; None: those of a packed SOURCE, else all: 48,894 merges,
    49,408 token ids."""
    context_length: int | None = None
    """Most tokens of a caption; None: that of a packed SOURCE, else 77."""
    name: str | None = None
    """Name of the data set; None: that of DIR."""
    license: str = ""
    """Licence of the pictures, for the manifest; none: that of a packed SOURCE, else not stated."""
    attribution: str = ""
    """Whom to credit, for the manifest; none: as for the licence."""

    def run(self) -> None:
        from m3i_fast.pipelines.packing.job import REFUSED_NAME, pack
        from m3i_fast.pipelines.storage.objects import url_of

        out = url_of(self.out) or str(self.out)
        settings = self.settings()

        def stop(number: int, _: object) -> NoReturn:
            said = "stopping: type the same command again, and the pack goes on where it was"
            console.print(said, soft_wrap=True)
            raise SystemExit(128 + number)

        before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            packed = pack(settings, self.out, self.runner(), console, cache_dir=self.cache_dir)
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
        for name, split in packed.manifest.splits.items():
            console.print(
                f"{name}: {split.num_samples} pictures in {split.num_groups} groups, "
                f"{split.num_captions} with a caption ({split.total_captions} captions), "
                f"{split.num_labels} with a label, {len(split.shards)} shards",
                highlight=False,
                soft_wrap=True,
            )
        _show_changes(packed)
        if packed.refused:
            console.print(_table(packed.refused))
            console.print(f"each by name, with what to do: {out}/{REFUSED_NAME}", soft_wrap=True)
        said = "was packed already" if packed.was_there else "wrote"
        console.print(f"{said} {out}", soft_wrap=True)

    def settings(self) -> PackSettings:
        """Return the settings of the job; ValueError names the flag that is wrong."""
        from m3i_fast.pipelines.packing.items import SourceOptions
        from m3i_fast.pipelines.packing.job import PackSettings
        from m3i_fast.pipelines.packing.plan import PlanSettings
        from m3i_fast.pipelines.packing.shard_task import ShardSettings
        from m3i_fast.pipelines.storage.objects import url_of

        if (source := url_of(self.source)) is not None:
            raise ValueError(
                f"SOURCE: expected a file or folder of this machine, got {source}: packing reads "
                "pictures in a shuffled order, a request each; copy it here first, or train on "
                f"tars where they lie after: m3i-fast data index {source}"
            )
        of_source = self._packed_source()
        num_merges, context_length = self.num_merges, self.context_length
        licence = attribution = "not stated"
        if of_source is not None:
            licence, attribution = of_source.licence, of_source.attribution
            if num_merges is None:
                num_merges = of_source.tokenizer.num_merges
            if context_length is None:
                context_length = of_source.tokenizer.context_length
        names = read_lines(self.class_names, "--class-names") if self.class_names else ()
        check_at_least(self, for_gpu=1, max_pixels=1, workers=1)
        return PackSettings(
            source=SourceOptions(
                path=self.source.absolute(),
                kind=self.kind,
                image_column=self.image_column,
                caption_columns=self.caption_column,
                label_column=self.label_column,
                group_column=self.group_column,
                split_column=self.split_column,
                json_captions=self.json_caption,
                image_root=self.image_root,
                delimiter=self.delimiter,
                class_names=names,
                label_as=self.label_as,
                columns=self.column,
                merge_rows=self.merge_rows,
                allow_outside=self.allow_outside,
                max_unpacked_gib=self.max_unpacked_gib,
                torchvision_class=self.torchvision_class,
            ),
            plan=PlanSettings(
                splits=self.split,
                limit=self.limit,
                seed=self.seed,
                samples_per_shard=self.samples_per_shard,
                near_duplicate_bits=self.group_near_duplicates,
                class_shares=self.class_share,
            ),
            shard=ShardSettings(
                num_merges=num_merges,
                context_length=77 if context_length is None else context_length,
                long_captions=self.long_captions,
                max_pixels=self.max_pixels,
                for_gpu=self.for_gpu,
            ),
            name=self.name or self.out.absolute().name,
            licence=self.license or licence,
            attribution=self.attribution or attribution,
        )

    def _packed_source(self) -> Manifest | None:
        """Return the manifest of a packed SOURCE."""
        from m3i_fast.pipelines.dataset.manifest import is_dataset, read_manifest

        if self.kind not in ("auto", "packed") or not is_dataset(self.source):
            return None
        return read_manifest(self.source)

    def runner(self) -> Run:
        """Return what runs the tasks: this process, several, or Ray."""
        from m3i_fast.pipelines.packing.workers import run_here, with_processes, with_ray

        if self.ray is not None:
            return with_ray(self.ray)
        number = self.workers or len(os.sched_getaffinity(0))  # a container's share of the cores
        return run_here if number == 1 else with_processes(number)


def _show_changes(packed: Packed) -> None:
    if packed.changes:
        kinds = ", ".join(f"{number} {change}" for change, number in packed.changes.items())
        console.print(f"encoded again: {kinds}", highlight=False, soft_wrap=True)
    if near := packed.manifest.settings.get("near_duplicates"):
        said = f"near duplicates: {near['pictures']} pictures in {near['groups']} groups"
        if number := near["in_another_split"]:
            said += f"; {number} have one in another split, and stay where they are"
        console.print(said, highlight=False, soft_wrap=True)
    if packed.num_cut:
        console.print(f"captions cut to the context: {packed.num_cut}", highlight=False)


def _table(refused: tuple[Refusal, ...]) -> Table:
    """Return a table of the refused files by reason, the most frequent first."""
    kinds: dict[str, list[Refusal]] = {}
    for refusal in refused:
        kind = re.split(r"[:,(]| got ", refusal.reason.removeprefix(f"{refusal.file}: "))[0]
        kinds.setdefault(kind, []).append(refusal)
    table = Table(title=f"refused: {len(refused)}", title_justify="left")
    table.add_column("number", justify="right")
    for name in ("first", "why", "what to do"):
        table.add_column(name, overflow="fold")
    for found in sorted(kinds.values(), key=len, reverse=True):
        table.add_row(*map(Text, (str(len(found)), *found[0])))
    return table
