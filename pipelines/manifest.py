"""manifest.json of a dataset directory: what the shards hold, read, checked and verified."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m3i_fast.pipelines.tokens import TokenizerInfo

MANIFEST_NAME = "manifest.json"
FORMAT = "m3i-fast-shards"
ONE_CAPTION, SEVERAL_CAPTIONS = 1, 2  # format versions; a picture has at most one in the first


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One tar and the index beside it."""

    file: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str

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
    num_labels: int
    num_groups: int
    shards: tuple[ShardInfo, ...]


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

    @property
    def format_version(self) -> int:
        """The lowest version that holds the data: what one caption a picture fits into stays 1."""
        several = any(split.max_captions > 1 for split in self.splits.values())
        return SEVERAL_CAPTIONS if several else ONE_CAPTION

    def to_json(self) -> str:
        raw = {**asdict(self), "format_version": self.format_version}
        if self.format_version == ONE_CAPTION:
            for split in raw["splits"].values():
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
    except (OSError, ValueError, TypeError, KeyError):
        return False


def read_manifest(path: Path) -> Manifest:
    """The manifest of a dataset directory.

    FileNotFoundError names the command that makes one; ValueError names another format or version.
    """
    file = path / MANIFEST_NAME
    make = f"make the shards with: m3i-fast data openmoji {path}"
    if not file.is_file():
        raise FileNotFoundError(f"no shards at {path} ({MANIFEST_NAME} is missing); {make}")
    try:
        raw = json.loads(file.read_text())
        found = (raw["format"], raw.pop("format_version"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a manifest of this package ({error!r}); {make}") from error
    known = [(FORMAT, ONE_CAPTION), (FORMAT, SEVERAL_CAPTIONS)]
    if found not in known:
        raise ValueError(f"{file}: expected a format of {known}, got {found}; {make}")
    splits = {name: _split_info(split, found[1]) for name, split in raw.pop("splits").items()}
    return Manifest(
        **{
            **raw,
            "class_names": tuple(raw["class_names"]),
            "tokenizer": TokenizerInfo(**raw["tokenizer"]),
            "min_image_size": tuple(raw["min_image_size"]),
            "max_image_size": tuple(raw["max_image_size"]),
            "splits": splits,
        }
    )


def _split_info(raw: dict[str, Any], version: int) -> SplitInfo:
    if version == ONE_CAPTION:
        raw = {**raw, "total_captions": raw["num_captions"], "max_captions": 1}
    return SplitInfo(**{**raw, "shards": tuple(ShardInfo(**s) for s in raw["shards"])})


def check_files(path: Path, split: SplitInfo) -> None:
    """Every shard and index of the split is there with the recorded size (no byte is read)."""
    make = f"make the shards again with: m3i-fast data openmoji {path}"
    for shard in split.shards:
        recorded = ((shard.file, shard.num_bytes), (shard.index_file, shard.index_bytes))
        for file, num_bytes in recorded:
            if not (path / file).is_file():
                raise FileNotFoundError(f"shard missing: {path / file}; {make}")
            size = (path / file).stat().st_size
            if size != num_bytes:
                raise ValueError(f"{path / file}: expected {num_bytes} bytes, got {size}; {make}")


def check_tokenizer(path: Path, manifest: Manifest, fingerprint: str) -> None:
    """ValueError where the shards hold ids of another tokenizer than the model's."""
    got = manifest.tokenizer
    if got.fingerprint != fingerprint:
        raise ValueError(
            f"{path}: shards of another tokenizer: expected {fingerprint}, got {got.fingerprint} "
            f"(num_merges {got.num_merges}, context_length {got.context_length}, "
            f"vocab_size {got.vocab_size}); pack again with: m3i-fast data openmoji {path}"
        )


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
