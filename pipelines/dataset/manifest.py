"""The manifest of a dataset directory, manifest.json: what the shards hold, read and checked."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import cattrs

from m3i_fast.durable_files import what_is_at
from m3i_fast.pipelines.dataset.annotations.columns import COLUMNS_SUFFIX, ColumnInfo, ColumnsInfo
from m3i_fast.pipelines.dataset.annotations.tokenizer import TokenizerInfo

MANIFEST_NAME = "manifest.json"
REFUSED_NAME = "refused.jsonl"  # what packing or indexing left out, beside the manifest
FORMAT = "m3i-fast-shards"
# Format versions: the first holds at most one caption a picture, the first two no alternates, the
# first three have an index beside each shard, the fourth a table a split, the fifth named columns
# as well, and the sixth columns of regions.
ONE_CAPTION, SEVERAL_CAPTIONS, ALTERNATES, TABLE, COLUMNS, REGIONS = 1, 2, 3, 4, 5, 6
_URL = re.compile(r"(s3|gs|https?)://[^/]")
INDEXED = "indexed"  # entry of the settings of tars that others wrote
PACKED = "pack"  # entry of the settings of pictures that others made
TABLE_SUFFIX = ".samples"
TOKENS_MEMBER = "tok"  # of captions that were tokenised before they were packed
# The flags of `m3i-fast data openmoji` for the data of `m3i-fast demo`.
DEMO_FLAGS = "--num-merges 500 --max-variants 3"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """A shard: one tar and, in format versions 1 to 3, the index beside it."""

    file: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_bytes: int | None = None
    index_sha256: str | None = None

    def __post_init__(self) -> None:
        place = PurePosixPath(self.file)
        if place.is_absolute() or ".." in place.parts or place.suffix != ".tar":
            raise ValueError(f"expected a .tar inside of the dataset directory, got {self.file!r}")
        if self.num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {self.num_samples}")

    @property
    def index_file(self) -> str:
        """Name of the index in the dataset directory."""
        return str(Path(self.file).with_suffix(".idx"))


@dataclass(frozen=True, kw_only=True, slots=True)
class TableInfo:
    """The table of a split (`sample_table`), a file in the dataset directory."""

    file: str
    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if PurePosixPath(self.file).name != self.file or not self.file.endswith(TABLE_SUFFIX):
            raise ValueError(
                f"expected a {TABLE_SUFFIX} file of the dataset directory, got {self.file!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitInfo:
    """The counts of one split, and its shards in order."""

    num_samples: int
    num_captions: int  # samples with at least one caption
    total_captions: int
    max_captions: int  # of one sample; at least 1
    max_alternates: int  # other pictures of one sample; 0: no sample has any
    num_labels: int
    num_groups: int
    shards: tuple[ShardInfo, ...]
    num_bad: int = 0  # samples that are not to be taken, counted in num_samples and nowhere else
    table: TableInfo | None = None  # None: format versions 1 to 3
    columns: ColumnsInfo | None = None  # None: the data set has no named columns

    def __post_init__(self) -> None:
        in_shards = sum(shard.num_samples for shard in self.shards)
        if not 1 <= self.num_samples == in_shards:
            raise ValueError(
                f"num_samples: expected {in_shards}, the sum of its shards, and at least 1, got "
                f"{self.num_samples}"
            )
        if not 0 <= self.num_bad < self.num_samples:
            raise ValueError(
                f"num_bad: expected 0 to {self.num_samples - 1}, so that a sample is left, got "
                f"{self.num_bad}"
            )

    @property
    def tables(self) -> tuple[TableInfo | ColumnsInfo, ...]:
        """Return the files of the dataset directory that hold a row a sample."""
        return tuple(info for info in (self.table, self.columns) if info is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything that a reader has to know before it opens a shard."""

    name: str
    class_names: tuple[str, ...]
    tokenizer: TokenizerInfo
    image_format: str
    min_image_size: tuple[int, int]  # height, width
    max_image_size: tuple[int, int]
    licence: str
    attribution: str
    settings: dict[str, Any]
    splits: dict[str, SplitInfo]
    # Member of a sample with its captions: "tok" (token ids), or "txt" or "json:FIELD" (text, which
    # is tokenised while loading).
    caption_member: str = TOKENS_MEMBER
    # What is known of samples beside class and captions; a file a split holds it.
    columns: tuple[ColumnInfo, ...] = ()
    # Absolute directory of the shards, or their URL; None: they lie beside the manifest.
    shards_in: str | None = None
    format: str = FORMAT

    def __post_init__(self) -> None:
        if not self.splits:
            raise ValueError("splits: expected at least one, got none")
        if len({split.table is None for split in self.splits.values()}) > 1:
            raise ValueError("splits: expected a table of each or of none, got one of some")
        for name, split in self.splits.items():
            if split.table is None and None in [shard.index_bytes for shard in split.shards]:
                raise ValueError(f"split {name}: expected a table, or an index of each shard")
            if (split.columns is None) == bool(self.columns):
                raise ValueError(
                    f"split {name}: expected {'a' if self.columns else 'no'} file of columns with "
                    f"{len(self.columns)} of them, got {'none' if self.columns else 'one'}"
                )
            if self.columns and split.table is None:
                raise ValueError(f"split {name}: expected a table beside its columns, got none")
        names = [column.name for column in self.columns]
        if len(set(names)) < len(names):
            raise ValueError(f"columns: expected a name once, got {', '.join(names)}")
        for column in self.columns:
            if column.kind == "text" and column.size != self.tokenizer.context_length:
                raise ValueError(
                    f"column {column.name}: expected size {self.tokenizer.context_length}, the "
                    f"tokenizer's context_length, got {column.size}"
                )
        kind, _, field = self.caption_member.partition(":")
        if self.caption_member not in (TOKENS_MEMBER, "txt") and not (kind == "json" and field):
            raise ValueError(
                f"caption_member: expected tok, txt or json:FIELD, got {self.caption_member!r}"
            )
        if self.shards_in is not None and self.shards_url is None:
            if not Path(self.shards_in).is_absolute():
                raise ValueError(
                    f"shards_in: expected an absolute path or a URL, got {self.shards_in!r}"
                )

    @property
    def format_version(self) -> int:
        """Lowest format version that holds the data, so that older readers read what they can."""
        if any(column.kind == "regions" for column in self.columns):
            return REGIONS
        if self.columns:
            return COLUMNS
        if any(split.table is not None for split in self.splits.values()):
            return TABLE
        if any(split.max_alternates > 0 for split in self.splits.values()):
            return ALTERNATES
        several = any(split.max_captions > 1 for split in self.splits.values())
        return SEVERAL_CAPTIONS if several else ONE_CAPTION

    def to_json(self) -> str:
        """Return the text of manifest.json, in the layout of `format_version`."""
        raw = {**asdict(self), "format_version": self.format_version}
        if self.shards_in is None:
            del raw["shards_in"]
        if self.format_version < TABLE:
            del raw["caption_member"]
        if self.format_version < COLUMNS:
            del raw["columns"]
        for split in raw["splits"].values():
            if self.format_version < COLUMNS:
                del split["columns"]
            if self.format_version < TABLE:
                del split["num_bad"], split["table"]
            for shard in split["shards"]:
                if shard["index_bytes"] is None:
                    del shard["index_bytes"], shard["index_sha256"]
            if self.format_version < ALTERNATES:
                del split["max_alternates"]
            if self.format_version < SEVERAL_CAPTIONS:
                del split["total_captions"], split["max_captions"]
        return json.dumps(raw, indent=2, sort_keys=True) + "\n"

    @property
    def digest(self) -> str:
        """Digest (sha256) of the manifest and, by the files' digests in it, of every byte.

        It does not depend on where the shards lie.
        """
        return hashlib.sha256(replace(self, shards_in=None).to_json().encode()).hexdigest()

    @property
    def shards_url(self) -> str | None:
        """URL of the shards, where they lie in object storage; None: in a folder."""
        found = self.shards_in is not None and _URL.match(self.shards_in)
        return self.shards_in if found else None

    def shards_of(self, path: Path) -> Path:
        """Return the directory of the shards of the dataset directory `path`.

        Raises ValueError where they lie in object storage, which the caller does not read.
        """
        if self.shards_url is not None:
            raise ValueError(
                f"{path}: expected shards in a folder, got an index of those in {self.shards_url}"
            )
        return path / (self.shards_in or "")

    def split(self, name: str) -> SplitInfo:
        """Return a split by name; ValueError lists the names there are."""
        if name not in self.splits:
            raise ValueError(f"split: expected one of {sorted(self.splits)}, got {name!r}")
        return self.splits[name]


def is_dataset(path: Path) -> bool:
    """Return whether `path` is a dataset directory of this package, of any format version."""
    try:
        return bool(json.loads((path / MANIFEST_NAME).read_text())["format"] == FORMAT)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def is_free(path: Path) -> bool:
    """Return whether a dataset can be written at `path` without replacing anything."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a dataset directory.

    Raises FileNotFoundError with the command that makes one where there is none, and ValueError
    naming an unknown format version, or the entry that is missing or wrong.
    """
    file = path / MANIFEST_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"{path}: expected a dataset directory with {MANIFEST_NAME}, got {what_is_at(path)}; "
            f"{_how_to_make(path)}"
        )
    try:
        raw = json.loads(file.read_text())
        stored = (raw["format"], raw.pop("format_version"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file} is not a manifest of this package ({error!r}); {_how_to_make(path)}"
        ) from error
    known = [(FORMAT, version) for version in range(ONE_CAPTION, REGIONS + 1)]
    if stored not in known:
        raise ValueError(
            f"{file}: expected a format of {known}, got {stored}; name another directory, or "
            "update m3i-fast where a newer one wrote it"
        )
    _fill_in(raw, stored[1])
    try:
        manifest = _converter.structure(raw, Manifest)
    except cattrs.BaseValidationError as error:
        reasons = cattrs.transform_error(error, "manifest", _reason)
        raise ValueError(f"{file}: {'; '.join(reasons)}") from error
    for version, what in ((TABLE, "tables"), (COLUMNS, "columns"), (REGIONS, "regions")):
        if (stored[1] >= version) != (manifest.format_version >= version):
            raise ValueError(
                f"{file}: expected {what} from format version {version} on alone, got {stored[1]}"
            )
    return manifest


def _fill_in(raw: dict[str, Any], version: int) -> None:
    """Add the entries that a manifest of an earlier version lacks."""
    splits = raw.get("splits")
    for split in splits.values() if isinstance(splits, dict) else ():
        if isinstance(split, dict) and version < SEVERAL_CAPTIONS:
            split.update(total_captions=split.get("num_captions"), max_captions=1)
        if isinstance(split, dict) and version < ALTERNATES:
            split.update(max_alternates=0)


def _exactly(value: Any, kind: type) -> Any:
    """Return a JSON value of exactly that type; cattrs would read "5" and 5.7 as 5."""
    if type(value) is not kind:
        raise ValueError(f"expected {kind.__name__}, got {value!r}")
    return value


def _reason(error: BaseException, kind: type | None) -> str:
    """Return the reason why cattrs, or a check in this file, refuses an entry."""
    if isinstance(error, AttributeError):  # cattrs looked for keys in something else
        return "expected a mapping"
    return str(error) if type(error) is ValueError else cattrs.v.format_exception(error, kind)


_converter = cattrs.Converter(forbid_extra_keys=True)
for _kind in (int, str):
    _converter.register_structure_hook(_kind, _exactly)


def _how_to_make(path: Path) -> str:
    """Tell how to make a dataset, without writing into a folder with files of the user."""
    if not is_free(path):
        real = path.resolve()
        parent = path.parent if path.name == real.name else real.parent
        new = parent / f"{real.name}-packed"
        return f"to pack what lies there, type: m3i-fast data pack {quoted(path)} {quoted(new)}"
    own = "pictures of your own are packed with `m3i-fast data pack SOURCE DIR`"
    demo = f"the demo's by: m3i-fast data openmoji {quoted(path)} {DEMO_FLAGS}"
    return f"name another directory, or make one there: {own}, {demo}"


def how_to_restore(path: Path, manifest: Manifest) -> str:
    """Tell how to restore files of a dataset that are missing or damaged."""
    is_made = not manifest.settings.keys() & {INDEXED, PACKED}
    if is_made and manifest.name in ("openmoji", "styles", "earth", "synthetic"):
        return (
            f"write the files again with the settings in {MANIFEST_NAME}: "
            f"m3i-fast data {manifest.name} {quoted(path)}"
        )
    restore = "copy the files again from where they came, or "
    if INDEXED in manifest.settings:
        command = index_command(path, manifest, str(manifest.shards_of(path)))
        return restore + f"index them as they are now: {command}"
    return restore + "pack the pictures again"


def index_command(path: Path, manifest: Manifest, tars: str) -> str:
    """Return the command that indexes the tars of a data set with its recorded columns."""
    command = f"m3i-fast data index {shlex.quote(tars)}"
    if manifest.shards_in is not None:
        command += f" --out {quoted(path)}"
    columns = manifest.settings[INDEXED]
    if isinstance(columns, dict):
        for name in ("caption", "label", "group"):
            value = columns.get(name)
            if name != "group" or value is not None:
                command += f" --{name}-column {shlex.quote(str(value or 'none'))}"
        command += " --decode" if columns.get("decode") else ""
        command += "".join(f" --column {shlex.quote(flag)}" for flag in columns.get("column", ()))
    return command


def quoted(path: Path) -> str:
    """Quote a path for a shell."""
    return shlex.quote(str(path))


def check_files(path: Path, manifest: Manifest, split: SplitInfo) -> None:
    """Check that every shard, index and table of a split has its recorded size, without reading it.

    Raises FileNotFoundError or ValueError naming the file, and how to restore it.
    """
    for _, error in file_faults(path, manifest, split):
        raise error


def file_faults(
    path: Path, manifest: Manifest, split: SplitInfo
) -> Iterator[tuple[str, FileNotFoundError | ValueError]]:
    """Yield (name of a file, what `check_files` raises for it)."""
    restore = how_to_restore(path, manifest)
    recorded = [(path, info.file, info.num_bytes) for info in split.tables]
    for shard in split.shards:
        recorded.append((manifest.shards_of(path), shard.file, shard.num_bytes))
        if shard.index_bytes is not None:
            recorded.append((path, shard.index_file, shard.index_bytes))
    for folder, name, num_bytes in recorded:
        if (error := file_fault(folder / name, num_bytes, restore)) is not None:
            yield name, error


def file_fault(file: Path, num_bytes: int, restore: str) -> FileNotFoundError | ValueError | None:
    """Return what is wrong with a table or shard that should have that size; None: nothing."""
    if not file.is_file():
        kind = {TABLE_SUFFIX: "table", COLUMNS_SUFFIX: "file of columns"}.get(file.suffix, "shard")
        return FileNotFoundError(f"{file}: expected a {kind}, got none; {restore}")
    if (size := file.stat().st_size) != num_bytes:
        return ValueError(f"{file}: expected {num_bytes} bytes, got {size}; {restore}")
    return None


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file in hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
