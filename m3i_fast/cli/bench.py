"""m3i-fast bench NAME: run one benchmark of m3i_fast.benchmarks."""

from __future__ import annotations

from m3i_fast.benchmarks.subjects import SUBJECTS, load
from m3i_fast.cli import listed, refuse, show_usage
from m3i_fast.did_you_mean import nearest


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        usage = "usage: m3i-fast bench NAME ...   (NAME --help tells more)"
        descriptions = {name: description for name, (_, description) in SUBJECTS.items()}
        return show_usage(f"{usage}\n\n{listed(descriptions)}", asked=bool(argv))
    name, rest = argv[0], argv[1:]
    if name not in SUBJECTS:
        known = ", ".join(SUBJECTS)
        return refuse(
            f"unknown benchmark {name!r}: expected one of {known}." + nearest(name, SUBJECTS)
        )
    return load(name)(rest) or 0
