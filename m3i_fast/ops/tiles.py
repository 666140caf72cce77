"""The tiles that kernels are built with: cuda/<op>/tiles.json and the header generated from it.

    python m3i_fast/ops/tiles.py            writes cuda/<op>/tiles.h
    python m3i_fast/ops/tiles.py --check    fails where a header is out of date; CMake runs it

A file has, for each card and class of calls, a policy and why it was chosen: "roofline model" until
a GPU has measured it; "measured", with `row`, its row in the ledger (`m3i-fast bench tune`); or "by
hand", with a `note`. A policy that kernels cannot be built with raises a ValueError that names the
file and the key; limits that only the compiler knows are static_asserts in tiling.h.

Standard library only, since CMake runs it before anything is installed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CUDA = Path(__file__).resolve().parents[2] / "cuda"

Policy = dict[str, int]
Table = dict[str, dict[str, Policy]]  # by card and class

# Smallest and largest values of the fields, by card and class of calls.
_Bounds = dict[str, tuple[int, int]]
_DCNV3: _Bounds = {
    "warps": (1, 32),
    "blocks": (1, 32),
    "bwd_blocks": (1, 32),
    "slots": (32, 4096),
    "chunk": (1, 1024),
}
_MMA: _Bounds = {
    "side": (32, 256),
    "stages": (2, 8),
    "warps_down": (1, 8),
    "warps_across": (1, 8),
}
_WGMMA: _Bounds = {
    "stages": (2, 8),
    "producer_registers": (24, 256),
    "consumer_registers": (24, 256),
}
_BLOCKS: _Bounds = {"grads_mib": (1, 1024)}
FIELDS: dict[str, dict[str, dict[str, _Bounds]]] = {
    "dcnv3": {
        "a100": {"small": _DCNV3, "large": _DCNV3},
        "h100": {"small": _DCNV3, "large": _DCNV3},
        "cpu": {"any": {"block_points": (16, 1 << 16)}},
    },
    "boltzmann": {
        "a100": {"half": _MMA, "float": _MMA, "blocks": _BLOCKS},
        "h100": {"half": _WGMMA, "float": _MMA, "blocks": _BLOCKS},
        "cpu": {
            "any": {"tile_columns": (16, 1 << 16), "run_rows": (1, 1 << 16), "least_runs": (1, 32)}
        },
    },
}

# Output pixels of an image between dcnv3's classes small (14 x 14) and large (28 x 28).
SMALL_PIXELS = 400


def path_of(op: str) -> Path:
    """Return the path of an op's policy file."""
    return CUDA / op / "tiles.json"


def header_of(op: str) -> Path:
    """Return the path of the header that is generated from an op's policy file."""
    return CUDA / op / "tiles.h"


# ---- Reading -------------------------------------------------------------------------------------


def read(op: str, path: Path | None = None) -> Table:
    """Read and check the policies of an op's file; ValueError names the file and the key."""
    path = path or path_of(op)
    where = "/".join(path.parts[-3:])
    try:
        entries = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected JSON, {error}") from error
    _expect_keys(where, "", entries, FIELDS[op])
    for card, classes in FIELDS[op].items():
        _expect_keys(where, card, entries[card], classes)
        for kind, bounds in classes.items():
            _check_entry(where, f"{card}.{kind}", entries[card][kind], bounds)
    table = {
        card: {kind: dict(entries[card][kind]["policy"]) for kind in classes}
        for card, classes in FIELDS[op].items()
    }
    check(op, table, where)
    return table


def _expect_keys(where: str, key: str, got: object, expected: Mapping[str, object]) -> None:
    name = f"{where}: {key or 'the file'}"
    if not isinstance(got, dict):
        raise ValueError(f"{name}: expected an object with {sorted(expected)}, got {got!r}")
    if got.keys() != expected.keys():
        raise ValueError(f"{name}: expected the keys {sorted(expected)}, got {sorted(got)}")


def _check_entry(where: str, key: str, entry: Any, bounds: _Bounds) -> None:
    why = entry.get("why") if isinstance(entry, dict) else None
    more = {"measured": {"row": 0}, "by hand": {"note": 0}, "roofline model": {}}
    if why not in more:
        raise ValueError(f"{where}: {key}.why: expected one of {sorted(more)}, got {why!r}")
    _expect_keys(where, key, entry, {"policy": 0, "why": 0, **more[why]})
    if why == "measured":
        _expect_keys(where, f"{key}.row", entry["row"], {"run_id": 0, "time": 0})
    _expect_keys(where, f"{key}.policy", entry["policy"], bounds)
    for name, (least, most) in bounds.items():
        value = entry["policy"][name]
        if type(value) is not int or not least <= value <= most:
            message = f"expected a whole number from {least} to {most}, got {value!r}"
            raise ValueError(f"{where}: {key}.policy.{name}: {message}")


def check(op: str, table: Table, where: str) -> None:
    """Raise ValueError where fields of a table do not fit each other; where: the file's name."""
    for card, kinds in table.items():
        for kind, policy in kinds.items():
            if problem := problem_of(policy):
                raise ValueError(f"{where}: {card}.{kind}.policy: {problem}")
    if op == "boltzmann" and table["h100"]["float"] != table["a100"]["float"]:
        raise ValueError(
            f"{where}: h100.float.policy: expected a100.float's {table['a100']['float']}, since "
            f"one kernel serves both, got {table['h100']['float']}"
        )


def problem_of(policy: Policy) -> str | None:
    """Return why no kernel can be built with a policy; None: one can."""
    if "chunk" in policy:
        return _problem_of_units(policy)
    if "warps_down" in policy:
        return _problem_of_tile(policy)
    if "producer_registers" in policy:
        return _problem_of_warpgroups(policy)
    if policy.get("tile_columns", 0) % 16:
        return f"tile_columns: expected a multiple of 16, got {policy['tile_columns']}"
    return None


def _problem_of_units(policy: Policy) -> str | None:
    threads = 32 * policy["warps"]
    if policy["chunk"] > threads:
        return f"chunk: expected at most the block's {threads} threads, got {policy['chunk']}"
    for name in ("blocks", "bwd_blocks"):
        if threads * policy[name] > 2048:
            most = 2048 // threads
            return f"{name}: expected at most {most} of {threads} threads, got {policy[name]}"
    return None


def _problem_of_tile(policy: Policy) -> str | None:
    warps = policy["warps_down"] * policy["warps_across"]
    if warps > 32:
        return f"warps_down * warps_across: expected at most 32, got {warps}"
    for name, part in (
        ("warps_down", 16 * policy["warps_down"]),
        ("warps_across", 16 * policy["warps_across"]),
        ("warps_down * warps_across", 8 * warps),
    ):
        if policy["side"] % part:
            return f"side: expected a multiple of {part} for its {name}, got {policy['side']}"
    return None


def _problem_of_warpgroups(policy: Policy) -> str | None:
    producer, consumer = policy["producer_registers"], policy["consumer_registers"]
    for name, count in (("producer_registers", producer), ("consumer_registers", consumer)):
        if count % 8:
            return f"{name}: expected a multiple of 8, got {count}"
    if producer > 168 or consumer < 168:
        return f"registers: expected a producer of at most 168 and a consumer of at least 168 " \
               f"(what a thread is launched with), got {producer} and {consumer}"  # fmt: skip
    if (producer + 2 * consumer) * 128 > 65536:
        return f"registers: expected at most 65536 a block, got {(producer + 2 * consumer) * 128}"
    return None


# ---- The header ----------------------------------------------------------------------------------


def render(op: str, table: Table) -> str:
    """Return the text of the header that the sources include, of a checked table."""
    body = {"dcnv3": _render_dcnv3, "boltzmann": _render_boltzmann}[op](table)
    return (
        f"// {op}: tiles. Made of tiles.json, which says why, by m3i_fast/ops/tiles.py.\n"
        f'#pragma once\n\n#include "{op}/policy.h"\n#include "m3i/types.h"\n\n'
        f"namespace m3i::{op} {{\n\n{body}\n}}  // namespace m3i::{op}\n"
    )


def _render_dcnv3(table: Table) -> str:
    rows = [
        f"    {{{', '.join(str(table[card][kind][name]) for name in _DCNV3)}}},  // {card}, {kind}"
        for card in ("a100", "h100")
        for kind in ("small", "large")
    ]
    return (
        "// Below compute capability 9.0 and from there on, images of few and of many pixels.\n"
        "inline constexpr Policy kPolicies[] = {\n" + "\n".join(rows) + "\n};\n"
        f"inline constexpr int64_t kSmallPixels = {SMALL_PIXELS};\n\n"
        f"inline constexpr int64_t kCpuBlockPoints = {table['cpu']['any']['block_points']};\n"
    )


def _render_boltzmann(table: Table) -> str:
    def mma(kind: str) -> str:
        return ", ".join(str(table["a100"][kind][name]) for name in _MMA)

    wgmma, cpu = table["h100"]["half"], table["cpu"]["any"]
    # Functions, since device code may not use a host's object
    lines = [
        f"M3I_HOST_DEVICE constexpr Policy {kind}_policy() {{ return {{{mma(kind)}}}; }}"
        for kind in ("half", "float")
    ]
    numbers = {
        "int kHopperStages": wgmma["stages"],
        "int kProducerRegisters": wgmma["producer_registers"],
        "int kConsumerRegisters": wgmma["consumer_registers"],
        "int kGradsMibA100": table["a100"]["blocks"]["grads_mib"],
        "int kGradsMibH100": table["h100"]["blocks"]["grads_mib"],
        "int64_t kCpuTileColumns": cpu["tile_columns"],
        "int64_t kCpuRunRows": cpu["run_rows"],
        "int64_t kCpuLeastRuns": cpu["least_runs"],
    }
    lines += [f"inline constexpr {name} = {value};" for name, value in numbers.items()]
    return "\n".join(lines) + "\n"


# ---- Writing -------------------------------------------------------------------------------------


def write_entry(path: Path, card: str, kind: str, entry: Mapping[str, object]) -> None:
    """Replace one entry of a policy file; every entry takes a line."""
    entries = json.loads(path.read_text())
    entries[card][kind] = dict(entry)
    cards = []
    for name, kinds in entries.items():
        lines = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in kinds.items()]
        cards.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    path.write_text("{\n" + ",\n".join(cards) + "\n}\n")


def write_headers() -> None:
    """Write the headers of all ops; raises as `read`."""
    for op in FIELDS:
        header_of(op).write_text(render(op, read(op)))


def check_headers() -> None:
    """Raise ValueError where a header is out of date, or as `read`."""
    for op in FIELDS:
        header, text = header_of(op), render(op, read(op))
        if not header.is_file() or header.read_text() != text:
            name = "/".join(header.parts[-3:])
            raise ValueError(
                f"{name}: expected what cuda/{op}/tiles.json says, got other tiles; run "
                "`python m3i_fast/ops/tiles.py`"
            )


def main(arguments: list[str]) -> int:
    """Write or check the headers; returns 0, 1 after a ValueError, 2 for other arguments."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write(f"tiles.py: expected no argument or --check, got {' '.join(arguments)}\n")
        return 2
    try:
        check_headers() if arguments == ["--check"] else write_headers()
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
