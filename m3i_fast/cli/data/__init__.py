"""m3i-fast data: pack, index, upload or write a data set, describe, verify or show one.

Sources and readers load torch: a command imports its own where it runs, and help does without.
"""

from __future__ import annotations

from typing import Annotated

import tyro

from m3i_fast.cli.data.drawings import Earth, OpenMoji, Styles, Synthetic
from m3i_fast.cli.data.index import Index
from m3i_fast.cli.data.pack import Pack
from m3i_fast.cli.data.push import Push
from m3i_fast.cli.data.show import Show
from m3i_fast.cli.data.stats import Stats
from m3i_fast.cli.data.verify import Verify
from m3i_fast.durable_files import expect_local

Command = (
    Annotated[Pack, tyro.conf.subcommand("pack")]
    | Annotated[OpenMoji, tyro.conf.subcommand("openmoji")]
    | Annotated[Styles, tyro.conf.subcommand("styles")]
    | Annotated[Earth, tyro.conf.subcommand("earth")]
    | Annotated[Synthetic, tyro.conf.subcommand("synthetic")]
    | Annotated[Index, tyro.conf.subcommand("index")]
    | Annotated[Stats, tyro.conf.subcommand("stats")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Push, tyro.conf.subcommand("push")]
)


def main(argv: list[str]) -> int:
    command = tyro.cli(Command, prog="m3i-fast data", args=argv)
    if isinstance(command, (OpenMoji, Styles, Earth, Synthetic)):  # Pack writes into a bucket, too
        expect_local(command.out, "OUT")
    command.run()
    return 0
