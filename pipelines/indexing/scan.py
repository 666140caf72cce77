"""The samples of a tar that others wrote: which of its files belong together, and where."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, field

from m3i_fast.pipelines.dataset.files import OpenFile
from m3i_fast.pipelines.tar_members import NAME, Part, Range, whole_tar_members

MOST_BYTES = 1 << 30  # of a sample


@dataclass(slots=True)
class Found:
    """A sample: neighbouring files of one key."""

    key: str
    start: int  # of its first header
    end: int = 0  # of its last padding
    parts: list[Part] = field(default_factory=list)
    fault: str | None = None


def scan(tar: OpenFile, size: int, most: int | None = None) -> tuple[list[Found], str | None]:
    """Find the samples of a tar: (samples, what is wrong with the tar; None: nothing).

    size: of the tar in bytes. most: samples after which the search ends; None: all. A sample that
    cannot be used has its `fault`. Of a tar that is cut off or damaged the samples before that
    place are returned; the last of them may lack files and has a fault.
    """
    samples: list[Found] = []
    keys: set[str] = set()
    fault = None
    try:
        for member, end in whole_tar_members(Range(tar.pread, 0, size), size):
            _add(samples, keys, member, end)
            if most is not None and len(samples) > most:  # the one before is whole
                return samples[:most], None
    except ValueError as error:
        fault = str(error)
        if samples and samples[-1].fault is None:
            samples[-1].fault = f"the tar ends in or after it: {fault}"
    return samples, fault


def _add(samples: list[Found], keys: set[str], member: tarfile.TarInfo, end: int) -> None:
    """Add a file to the last sample, or to a new one."""
    match = NAME.fullmatch(member.name)
    if match is None or not member.isreg():
        # It belongs to no sample, unless it is a link in the place of a file of one.
        if match is not None and samples and samples[-1].key == match[1]:
            samples[-1].fault = f"{member.name}: expected a file, got a link or a device"
        return
    key, extension = match[1], match[2].lower()
    if not samples or samples[-1].key != key:
        samples.append(Found(key, member.offset))
        if key in keys:
            samples[-1].fault = (
                "its key stands in this tar before: expected the files of a sample next to each "
                "other, and each key once"
            )
        keys.add(key)
    found = samples[-1]
    if extension in [part.extension for part in found.parts]:
        found.fault = f"expected each file once, got two of {extension}"
    elif found.parts and member.offset != found.end:
        found.fault = f"expected its files next to each other, got others before its {extension}"
    found.parts.append(Part(extension, member.offset_data, member.size))
    found.end = end
    if found.end - found.start > MOST_BYTES:
        found.fault = f"expected at most {MOST_BYTES} bytes, got {found.end - found.start}"
