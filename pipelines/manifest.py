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
FORMAT_VERSION = 1


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
    num_captions: int
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
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

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
        found = (raw["format"], raw["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a manifest of this package ({error!r}); {make}") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"{file}: expected format {(FORMAT, FORMAT_VERSION)}, got {found}; {make}")
    splits = {
        name: SplitInfo(**{**split, "shards": tuple(ShardInfo(**s) for s in split["shards"])})
        for name, split in raw.pop("splits").items()
    }
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


def verify(path: Path) -> Manifest:
    """Read every byte and compare with the recorded digests; ValueError at the first difference."""
    manifest = read_manifest(path)
    for split in manifest.splits.values():
        check_files(path, split)
        for shard in split.shards:
            recorded = ((shard.file, shard.sha256), (shard.index_file, shard.index_sha256))
            for file, expected in recorded:
                got = sha256_file(path / file)
                if got != expected:
                    raise ValueError(f"{path / file}: expected sha256 {expected}, got {got}")
    return manifest
