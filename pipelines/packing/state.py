"""What an unfinished pack was begun with, so that it is not gone on with something else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from m3i_fast.pipelines.packing.items import Item, Listing, Stamp, keyed
from m3i_fast.pipelines.packing.output import STATE, Output

SETTINGS = f"{STATE}/settings.json"
_SHOWN = 5
_DIGESTS = ("source_sha256", "listed_sha256")  # of what is compared line by line


def check_unchanged(out: Output, described: dict[str, Any], listing: Listing) -> None:
    """Record settings and listing of a new pack, or compare them with those of one that was begun.

    Raises ValueError that says which settings or files changed, and what to do.
    """
    listed = _lines(*keyed(listing.items, listing.files, is_shared=out.is_shared))
    before = out.read(SETTINGS)
    if before is None:
        content = "".join(f"{line}\n" for line in listed).encode()
        digest = hashlib.sha256(content).hexdigest()
        # Named by its digest: a pack that another machine begins at the same time, and that is
        # refused by the settings, has not replaced the list that these settings go with.
        out.write(_list_file(digest), content)
        out.create(SETTINGS, json.dumps(described | {"listed_sha256": digest}).encode())
        return
    earlier = json.loads(before)
    changed = [
        f"{key} was {earlier.get(key)!r}, is {described.get(key)!r}"
        for key in dict.fromkeys([*described, *earlier])
        if key not in _DIGESTS and earlier.get(key) != described.get(key)
    ]
    before = out.read(_list_file(earlier.get("listed_sha256"))) or b""
    changed += _changes(before.decode().splitlines(), listed)
    if changed:
        raise ValueError(
            f"DIR: {out.place} holds a pack that was begun with another source or other settings: "
            f"{'; '.join(changed)}. Go on with those, or remove {out.place} and pack anew"
        )


def _list_file(digest: str | None) -> str:
    return f"{STATE}/listed-{digest}.jsonl"


def _lines(items: Iterable[Item], files: Mapping[str, Stamp]) -> list[str]:
    """Return a line a picture, and a file that holds many: name, hash of all that is listed."""
    entries: Iterable[tuple[str, Any]] = (
        *files.items(),
        # as before there were columns, where an item has none
        *((item.name, item if item.columns else item[:-1]) for item in items),
    )
    return [
        json.dumps([name, hashlib.sha256(json.dumps(entry).encode()).hexdigest()[:16]])
        for name, entry in entries
    ]


def _changes(before: list[str], now: list[str]) -> list[str]:
    """Say which pictures are new, gone or changed."""
    if before == now:
        return []
    old, new = (dict(map(json.loads, lines)) for lines in (before, now))
    kinds = {
        "new": [name for name in new if name not in old],
        "gone": [name for name in old if name not in new],
        "changed": [name for name in new if name in old and old[name] != new[name]],
    }
    said = [
        f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for kind, names in kinds.items()
        if names
    ]
    return [f"pictures of the source: {', '.join(said) or 'another order'}"]
