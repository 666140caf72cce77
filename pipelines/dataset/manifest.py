"""manifest.json of a dataset directory: what the shards hold, read and checked."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import cattrs

from m3i_fast.pipelines.dataset.tokens import TokenizerInfo

MANIFEST_NAME = "manifest.json"
FORMAT = "m3i-fast-shards"
# Format versions: a picture has at most one caption in the first, samples have one picture in both.
ONE_CAPTION, SEVERAL_CAPTIONS, ALTERNATES = 1, 2, 3
# What `m3i-fast demo` packs, as a person types it.
DEMO_FLAGS = "--num-merges 500 --max-variants 3"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One tar and the index beside it."""

    file: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str

    def __post_init__(self) -> None:
        place = PurePosixPath(self.file)
        if place.is_absolute() or ".." in place.parts or place.suffix != ".tar":
            raise ValueError(f"expected a .tar inside of the dataset directory, got {self.file!r}")
        if self.num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {self.num_samples}")

    @property
    def index_file(self) -> str:
        return str(Path(self.file).with_suffix(".idx"))


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitInfo:
    """Counts of one split and its shards in order."""

    num_samples: int
    num_captions: int  # samples with at least one caption
    total_captions: int
    max_captions: int  # of one sample; at least 1
    max_alternates: int  # other pictures of one sample; 0: no sample has any
    num_labels: int
    num_groups: int
    shards: tuple[ShardInfo, ...]

    def __post_init__(self) -> None:
        in_shards = sum(shard.num_samples for shard in self.shards)
        if not 1 <= self.num_samples == in_shards:
            raise ValueError(
                f"num_samples: expected {in_shards}, the sum of its shards, and at least 1, got "
                f"{self.num_samples}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything a reader must know before it opens a shard."""

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
    format: str = FORMAT

    def __post_init__(self) -> None:
        if not self.splits:
            raise ValueError("splits: expected at least one, got none")

    @property
    def format_version(self) -> int:
        """The lowest version that holds the data: what one caption a picture fits into stays 1."""
        if any(split.max_alternates > 0 for split in self.splits.values()):
            return ALTERNATES
        several = any(split.max_captions > 1 for split in self.splits.values())
        return SEVERAL_CAPTIONS if several else ONE_CAPTION

    def to_json(self) -> str:
        raw = {**asdict(self), "format_version": self.format_version}
        for split in raw["splits"].values():
            if self.format_version < ALTERNATES:
                del split["max_alternates"]
            if self.format_version < SEVERAL_CAPTIONS:
                del split["total_captions"], split["max_captions"]
        return json.dumps(raw, indent=2, sort_keys=True) + "\n"

    @property
    def digest(self) -> str:
        """sha256 of the manifest; through the shards' own digests it stands for every byte."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def split(self, name: str) -> SplitInfo:
        """The split, or ValueError naming those there are."""
        if name not in self.splits:
            raise ValueError(f"split: expected one of {sorted(self.splits)}, got {name!r}")
        return self.splits[name]


def is_dataset(path: Path) -> bool:
    """Whether `path` is a directory written by this package (of any format version)."""
    try:
        return bool(json.loads((path / MANIFEST_NAME).read_text())["format"] == FORMAT)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def is_free(path: Path) -> bool:
    """Whether a dataset can be written at `path` without replacing anything."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a dataset directory.

    Raises FileNotFoundError where there is none, with the command that makes one; ValueError names
    another format or version, and the entry that is missing or wrong.
    """
    file = path / MANIFEST_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"no dataset at {path} ({MANIFEST_NAME} is missing); {_how_to_make(path)}"
        )
    try:
        raw = json.loads(file.read_text())
        found = (raw["format"], raw.pop("format_version"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file} is not a manifest of this package ({error!r}); {_how_to_make(path)}"
        ) from error
    known = [(FORMAT, version) for version in (ONE_CAPTION, SEVERAL_CAPTIONS, ALTERNATES)]
    if found not in known:
        raise ValueError(
            f"{file}: expected a format of {known}, got {found}; name another directory, or update "
            "m3i-fast where a newer one wrote it"
        )
    _fill_in(raw, found[1])
    try:
        return _converter.structure(raw, Manifest)
    except cattrs.BaseValidationError as error:
        reasons = cattrs.transform_error(error, "manifest", _reason)
        raise ValueError(f"{file}: {'; '.join(reasons)}") from error


def _fill_in(raw: dict[str, Any], version: int) -> None:
    """Add what a manifest of an earlier version leaves out."""
    splits = raw.get("splits")
    for split in splits.values() if isinstance(splits, dict) else ():
        if isinstance(split, dict) and version < SEVERAL_CAPTIONS:
            split.update(total_captions=split.get("num_captions"), max_captions=1)
        if isinstance(split, dict) and version < ALTERNATES:
            split.update(max_alternates=0)


def _exactly(value: Any, kind: type) -> Any:
    """Take a JSON value of that type alone: cattrs would read "5" and 5.7 as 5."""
    if type(value) is not kind:
        raise ValueError(f"expected {kind.__name__}, got {value!r}")
    return value


def _reason(error: BaseException, kind: type | None) -> str:
    """Say what cattrs, or a check of ours, has to say of an entry."""
    if isinstance(error, AttributeError):  # cattrs took its keys, and there are none
        return "expected a mapping"
    return str(error) if type(error) is ValueError else cattrs.v.format_exception(error, kind)


_converter = cattrs.Converter(forbid_extra_keys=True)
for _kind in (int, str):
    _converter.register_structure_hook(_kind, _exactly)


def _how_to_make(path: Path) -> str:
    """Say how to get a dataset, without writing into a folder of the user's own files."""
    own = "pictures of your own are packed by m3i_fast.pipelines.dataset.pack.write_dataset"
    demo = f"the demo's by: m3i-fast data openmoji {{}} {DEMO_FLAGS}"
    if is_free(path):
        return f"name another directory, or make one there: {own}, " + demo.format(quoted(path))
    return (
        "what is there is no dataset and stays as it is: name another directory, or make a new "
        f"one: {own}, " + demo.format("NEW_DIRECTORY")
    )


def how_to_restore(path: Path, manifest: Manifest) -> str:
    """Say how to restore files of a dataset that are missing or damaged."""
    if manifest.name in ("openmoji", "styles", "synthetic"):
        return (
            f"write the files again with the settings in {MANIFEST_NAME}: "
            f"m3i-fast data {manifest.name} {quoted(path)}"
        )
    return "copy the files again from where they came, or pack the pictures again"


def quoted(path: Path) -> str:
    """Write a path as a shell takes it."""
    return shlex.quote(str(path))


def check_files(path: Path, manifest: Manifest, split: SplitInfo) -> None:
    """Check that every shard and index of the split has the recorded size; no byte is read."""
    for shard in split.shards:
        recorded = ((shard.file, shard.num_bytes), (shard.index_file, shard.index_bytes))
        for file, num_bytes in recorded:
            restore = how_to_restore(path, manifest)
            if not (path / file).is_file():
                raise FileNotFoundError(f"shard missing: {path / file}; {restore}")
            size = (path / file).stat().st_size
            if size != num_bytes:
                raise ValueError(
                    f"{path / file}: expected {num_bytes} bytes, got {size}; {restore}"
                )


def check_tokenizer(path: Path, manifest: Manifest, fingerprint: str) -> None:
    """ValueError where the shards hold ids of another tokenizer than the model's."""
    got = manifest.tokenizer
    if got.fingerprint != fingerprint:
        raise ValueError(
            f"{path}: shards of another tokenizer: expected {fingerprint}, got {got.fingerprint} "
            f"(num_merges {got.num_merges}, context_length {got.context_length}, "
            f"vocab_size {got.vocab_size}); name shards packed with the model's, or pack these "
            "pictures again with it"
        )


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
