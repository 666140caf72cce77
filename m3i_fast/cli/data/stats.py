"""m3i-fast data stats: what a data set holds, by counts and distributions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.table import Table
from rich.text import Text

from m3i_fast.cli import console as messages
from m3i_fast.config.data import CACHE_DIR
from m3i_fast.terminal import make_console, progress_bar

if TYPE_CHECKING:
    from m3i_fast.pipelines.dataset.files import DatasetFiles

BAR = 30  # characters of the longest bar of a histogram


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Count pictures, captions, labels, classes, groups and bytes of a data set.

    All samples are counted by their table; of some the files are read, for sizes of pictures and
    lengths of captions.
    """

    path: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DATASET")]]
    """Dataset directory, or its URL in object storage."""
    split: str | None = None
    """Split to describe; None: all."""
    read: int = 2000
    """Samples of each split to read the files of, spread evenly."""
    json: bool = False
    """Print one JSON object instead of tables."""
    cache_dir: Path = CACHE_DIR
    """Folder of this machine for copies of a bucket's manifest and tables."""

    def run(self) -> None:
        from m3i_fast.pipelines.storage.remote_files import opened_files

        if self.read < 1:
            raise ValueError(f"--read: expected at least 1, got {self.read}")
        with opened_files(self.path, self.cache_dir) as files:
            found, name_of_set = self._describe(files), files.manifest.name
        console = make_console()
        if self.json:
            console.print_json(json.dumps({"name": name_of_set, "splits": found}))
            return
        for name, facts in found.items():
            table = Table("", "", title=Text(f"{name_of_set}: {name}"), show_header=False)
            for row in _rows(facts):
                table.add_row(*(Text(cell) for cell in row))
            console.print(table)

    def _describe(self, files: DatasetFiles) -> dict[str, dict[str, Any]]:
        """Describe the splits, with a bar of the samples that are read."""
        from m3i_fast.pipelines.dataset.files import check_sizes
        from m3i_fast.pipelines.inspection.statistics import describe

        names = list(files.manifest.splits) if self.split is None else [self.split]
        splits = [files.manifest.split(name) for name in names]
        total = sum(min(self.read, split.num_samples - split.num_bad) for split in splits)
        found = {}
        with progress_bar("reading samples", total, console=messages) as update:
            for name, split in zip(names, splits, strict=True):
                check_sizes(files, split)
                found[name] = describe(files, name, read=self.read, advance=update)
        return found


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    read, groups, classes = facts["read"], facts["groups"], facts["classes"]
    yield "pictures", f"{facts['samples']:,}, of which {facts['bad']:,} are not taken"
    yield "shards", f"{facts['shards']:,}, {facts['bytes'] / 1e9:,.2f} GB of samples"
    yield "bytes a picture", _spread(facts["bytes_a_sample"])
    yield "with a caption", f"{facts['with_caption']:,} ({facts['captions']:,} captions)"
    yield "with a label", f"{facts['with_label']:,}"
    yield (
        "groups",
        f"{groups['groups']:,}, {groups['of_several']:,} of several pictures, the largest of "
        f"{groups['largest']:,}",
    )
    yield "classes", f"{classes['classes']:,}, {classes['without_samples']:,} without a picture"
    for title, key in (("classes with most", "most"), ("classes with least", "least")):
        if classes[key]:
            yield title, ", ".join(f"{c['class']} {c['samples']:,}" for c in classes[key])
    for column in facts["columns"]:
        of = f" of {column['names']:,}" if column["names"] else ""
        yield f"column {column['column']}", f"{column['kind']}{of}, of {column['known']:,} pictures"
    yield (
        f"of {read['samples']:,} that were read",
        ", ".join(f"{number:,} {name}" for name, number in read["formats"].items()),
    )
    yield "height", _spread(read["height"])
    yield "width", _spread(read["width"])
    longest = max(row["samples"] for row in read["short_side"])
    for row in read["short_side"]:
        bar = "#" * max(1, round(BAR * row["samples"] / longest))
        yield f"short side from {row['from']}", f"{bar} {row['samples']:,}"
    if read["captions"]:
        yield "tokens a caption", _spread(read["caption_tokens"])
        limit, cut = read["context_length"], read["captions_cut"]
        if cut is not None:
            yield f"captions cut at {limit}", f"{cut:,} ({cut / read['captions']:.1%})"
        elif read["captions_cut_of_all_splits"] is not None:
            number = f"{read['captions_cut_of_all_splits']:,} of all splits, as packing counted"
            yield f"captions cut at {limit}", number
        else:
            full = read["captions_full"]
            share = f"{full:,} ({full / read['captions']:.1%})"
            yield f"captions that fill the context of {limit}", share


def _spread(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,g}" for name, value in values.items())
