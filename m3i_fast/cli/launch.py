"""m3i-fast launch: torchrun for a job that a scheduler stops and starts again."""

from __future__ import annotations

import os
import signal
from argparse import Namespace
from contextlib import suppress
from types import FrameType

import psutil

from m3i_fast.cli import VERBS, show_usage
from m3i_fast.engine.parallel.watchdog import LOST_PEER, MissingRanks

USAGE = """\
usage: m3i-fast launch [--retry-code N] [options of torchrun] train RECIPE ...

Takes torchrun's arguments (torchrun --help), with a verb of m3i-fast in the place of a script, or a
script as torchrun does. It differs from torchrun in three things. SIGINT, SIGTERM
and SIGUSR1 go to the ranks, which save for as long as the scheduler lets them; torchrun kills them
after 30 s. When the first node has ended, the ranks of the others have a minute to end by
themselves; torchrun kills them at once. The exit code is that of the rank which failed first, 75
where the ranks saved to be started again, 76 where a rank hung or never came, or a node (torchrun
waits ten minutes for nodes, or --rdzv-conf join_timeout=SECONDS; with --master-addr,
timeout=SECONDS); torchrun's is 1 whatever happened.

  --retry-code N   exit with N instead of 75 and of 69 (a rank of another node was lost), for a
                   scheduler that takes these as final
"""
_RETRY = os.EX_TEMPFAIL
_LEFT_TO_TORCHRUN = "SIGHUP,SIGQUIT"


class Forwarder:
    """A handler that passes signals on to the ranks of this node."""

    def __init__(self) -> None:
        self.received: set[int] = set()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received.add(number)
        ranks = _ranks()
        if not ranks:  # nothing has been done that could be saved
            raise SystemExit(128 + number if number == signal.SIGINT else _RETRY)
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        return show_usage(USAGE, asked=bool(argv))
    retry, arguments = retry_code(argv)
    forward = Forwarder()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, forward)
    code = run_torchrun(arguments, forward)
    return retry if retry is not None and code in (_RETRY, LOST_PEER) else code


def run_torchrun(arguments: list[str], forward: Forwarder) -> int:
    """Start this node's ranks and wait for them; return the exit code of the job.

    Raises MissingRanks where nodes do not meet.
    """
    from torch.distributed import DistNetworkError, DistStoreError  # seconds: help needs none
    from torch.distributed import run as torchrun
    from torch.distributed.elastic import rendezvous
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from m3i_fast.engine.parallel import agents

    args = parse(arguments)
    args.signals_to_handle = _LEFT_TO_TORCHRUN
    if args.rdzv_backend == "c10d":
        agents.register()
        args.rdzv_backend = agents.PATIENT
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return exit_code(first.exitcode, forward.received)
    except (
        DistStoreError,
        DistNetworkError,
        rendezvous.RendezvousTimeoutError,
        rendezvous.RendezvousConnectionError,
    ) as error:
        if "EADDRINUSE" in str(error):
            raise
        raise MissingRanks(_missing_nodes(args, error)) from None
    except SystemExit as stopped:  # of the handler, while the nodes waited for each other
        return int(stopped.code or 0)
    return 0


def parse(arguments: list[str]) -> Namespace:
    """Parse torchrun's arguments, in which a verb of m3i-fast may stand for a script."""
    from torch.distributed import run as torchrun

    args = torchrun.parse_args(arguments)
    if args.training_script in VERBS and not (args.module or args.no_python):
        args.training_script_args.insert(0, args.training_script)
        args.training_script, args.module = "m3i_fast.cli", True
    return args


def retry_code(argv: list[str]) -> tuple[int | None, list[str]]:
    """Return the code that stands for 75 and 69, if one is asked for, and torchrun's arguments."""
    name, _, value = argv[0].partition("=")
    if name != "--retry-code":
        return None, argv
    rest = argv[1:]
    if not value:
        value, rest = "".join(rest[:1]), rest[1:]
    if not value.isdecimal() or not 0 < int(value) < 256:
        raise ValueError(f"--retry-code: expected a number from 1 to 255, got {value!r}")
    return int(value), rest


def exit_code(code: int, received: set[int]) -> int:
    """Return a rank's exit code as a shell has it; 75 if a signal ended it before it could save."""
    if code >= 0:
        return code
    return _RETRY if -code in received - {signal.SIGINT} else 128 - code


def _missing_nodes(args: Namespace, error: Exception) -> str:
    place = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port}"
    limit = "timeout" if args.rdzv_backend == "static" else "join_timeout"
    why = f": {error.__cause__ or error}".removesuffix(": ")
    return (
        f"nodes are missing, or have gone: expected {args.nnodes} to meet at {place}{why}; see "
        "whether each of them runs this command, and reaches that address, or set --rdzv-conf "
        f"{limit}=SECONDS to wait longer"
    )


def _ranks() -> list[int]:
    """Return the processes that torchrun started: children that lead a process session."""
    return [child.pid for child in psutil.Process().children() if _leads_a_session(child.pid)]


def _leads_a_session(pid: int) -> bool:
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:  # it has ended since
        return False
