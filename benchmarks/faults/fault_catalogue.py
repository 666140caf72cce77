"""What can happen to a run: each fault, where it strikes, and how the run must take it."""

from __future__ import annotations

import errno
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from m3i_fast.benchmarks.faults.campaign import (
    FAILED,
    KILLED,
    REFUSED,
    SAVED,
    STEPS,
    STUCK,
    Campaign,
    Run,
    Trial,
    outcome,
    wait,
)
from m3i_fast.benchmarks.faults.failing_files import NAMES, flip_byte, truncate
from m3i_fast.benchmarks.faults.faulted_process import PHASES, Fault
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.parallel.watchdog import EXIT_CODE

MIDDLE = 7  # a step after some checkpoints and before the last
SPOILT = 8  # the step of the checkpoint whose writes are struck
WATCHDOG = ("--watchdog-minutes", "0.25")
AT_MIDDLE = f"step {MIDDLE}"


def plan(
    campaign: Campaign, *, kills: int, writes: int | None = None, seed: int = 0
) -> list[Trial]:
    """Return the trials of a campaign.

    kills: at random moments. writes: of those while one checkpoint is there so many, evenly spread,
    or all; each is torn by a kill, and lost with a power cut.
    """
    rng = random.Random(seed)
    moments = [[rng.uniform(0, campaign.seconds) for _ in range(2)] for _ in range(kills)]
    points = _write_points(campaign)
    if writes is not None:
        points = [points[len(points) * n // writes] for n in range(writes)]
    return [
        *(_kill(*pair) for pair in sorted(moments)),
        *(_at_write(campaign, number, how) for how in WRITES for number in points),
        *(_damage(name) for name in DAMAGES),
        Trial(fault="disk full", where="after two checkpoints", spoil=_fill_disk),
        Trial(fault="read-only directory", where="from write 70 on", spoil=_lock_disk),
        *(_stopped(phase) for phase in PHASES),
        Trial(fault="one rank of two dies", where=AT_MIDDLE, ranks=2, spoil=_rank_dies),
        Trial(fault="one rank of two hangs", where=AT_MIDDLE, ranks=2, spoil=_rank_hangs),
        *(_nan(ranks) for ranks in (1, 2)),
        *(_clock(hours) for hours in (-48.0, 48.0)),
        Trial(fault="two runs in one directory", where=AT_MIDDLE, spoil=_two_runs),
        *(_other_ranks(before, now) for before, now in ((2, 1), (1, 2))),
    ]


# ---- Kills ---------------------------------------------------------------------------------------

WRITES = {"torn": "kill -9 at a write", "power_cut": "power cut at a write"}


def _kill(moment: float, of_next: float) -> Trial:
    """And once more, unless it ends before; a first run that does is killed earlier."""

    def spoil(campaign: Campaign, run: Run) -> bool:
        after = moment
        while not run.codes or run.codes[-1] == [0]:
            shutil.rmtree(run.out, ignore_errors=True)
            campaign.go(run, kill_after=after)
            after *= 0.8
        campaign.go(run, kill_after=of_next)
        return run.codes[-2] == [KILLED] and run.codes[-1] in ([KILLED], [0])

    where = f"{moment:.2f} s, then {of_next:.2f} s"
    return Trial(fault="kill -9 at a random moment", where=where, spoil=spoil)


def _write_points(campaign: Campaign) -> list[int]:
    """Return the operations from the first write of one checkpoint to its deletion.

    Of consecutive writes to a file the first and the last.
    """
    operations = campaign.operations
    ours = [n for n, (_, path) in enumerate(operations) if f"step_{SPOILT:08d}" in path]
    span = range(ours[0], ours[-1] + 1)
    return [
        n for n in span if operations[n] != operations[n - 1] or operations[n] != operations[n + 1]
    ]


def _at_write(campaign: Campaign, number: int, how: str) -> Trial:
    """Strike a write; the checkpoint before the one that is written stays."""

    def spoil(campaign: Campaign, run: Run) -> bool:
        campaign.go(run, inside={0: [_files(run, kill_at=number, **{how: True})]})
        return run.codes[-1] == [KILLED] and run.saved.step >= SPOILT - 2

    kind, path = campaign.operations[number]
    return Trial(fault=WRITES[how], where=f"{number}: {kind} {path}", spoil=spoil)


def _files(run: Run, **options: object) -> Fault:
    run.out.mkdir(exist_ok=True)
    return "files", {"root": run.out, **options}


# ---- Damaged and full ----------------------------------------------------------------------------


def _file(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[-1]


DAMAGES: dict[str, Callable[[Path], object]] = {  # what is done to the newest checkpoint
    "flipped byte, weights": lambda at: flip_byte(_file(at, "model/*")),
    "flipped byte, moments": lambda at: flip_byte(_file(at, "optimizer/*")),
    "flipped byte, state": lambda at: flip_byte(_file(at, "state/*")),
    "flipped byte, manifest": lambda at: flip_byte(at / "manifest.json"),
    "truncated file": lambda at: truncate(_file(at, "model/*")),
    "empty file": lambda at: truncate(_file(at, "optimizer/*"), 0),
    "missing file of a rank": lambda at: _file(at, "state/*").unlink(),
    "missing manifest": lambda at: (at / "manifest.json").unlink(),
    "missing checkpoint": shutil.rmtree,
    "pointer to nothing": lambda at: (at.parent / "latest").write_text("step_99999999\n"),
    "no pointer": lambda at: (at.parent / "latest").unlink(),
}


def _damage(name: str) -> Trial:
    ranks = 2 if name.endswith("rank") else 1

    def spoil(campaign: Campaign, run: Run) -> bool:
        campaign.go(run, ranks, inside={0: [_signal(signal.SIGTERM, "data")]})
        DAMAGES[name](checkpoint.checkpoints(run.out / "checkpoints")[-1].path)
        return run.codes[-1] == [SAVED] * ranks

    return Trial(fault=name, where=f"after {AT_MIDDLE}", ranks=ranks, spoil=spoil)


def _fill_disk(campaign: Campaign, run: Run) -> bool:
    run.out.mkdir()
    kept = run.folder / "kept"
    with _small_disk(run.out, campaign.bytes_of_a_checkpoint * 5 // 2) as mounted:
        campaign.go(run, inside={} if mounted else {0: [_files(run, fail_at=500)]})
        shutil.copytree(run.out, kept)
    shutil.copytree(kept, run.out, dirs_exist_ok=True)
    return run.codes[-1] == [FAILED]


@contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Mount a tmpfs at `folder`; yield False where none can be mounted."""
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(["mount", *options], capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def _lock_disk(campaign: Campaign, run: Run) -> bool:
    refused = _files(run, fail_at=70, error=errno.EROFS, kinds=NAMES)
    campaign.go(run, inside={0: [refused]})
    return run.codes[-1] == [FAILED]


# ---- Signals, ranks ------------------------------------------------------------------------------


def _signal(number: int, phase: str, call: int = MIDDLE) -> Fault:
    return "send", {"number": int(number), "phase": phase, "call": call}


def _stopped(phase: str) -> Trial:
    """SIGTERM before there is anything to save ends the run at once, and it begins again."""
    call = {"start": 1, "saving": 3, "writing": 3}.get(phase, MIDDLE)
    expected = -int(signal.SIGTERM) if phase == "start" else SAVED

    def spoil(campaign: Campaign, run: Run) -> bool:
        campaign.go(run, inside={0: [_signal(signal.SIGTERM, phase, call)]})
        return run.codes[-1] == [expected]

    return Trial(fault=f"SIGTERM in {phase}", where=f"call {call}", spoil=spoil)


def _rank_dies(campaign: Campaign, run: Run) -> bool:
    campaign.go(run, 2, inside={1: [_signal(signal.SIGKILL, "backward")]})
    [first, second] = run.codes[-1]
    return first == FAILED and second == KILLED


def _rank_hangs(campaign: Campaign, run: Run) -> bool:
    """Its watchdog cannot say so, being stopped as well; that of the other rank does."""
    inside = {1: [_signal(signal.SIGSTOP, "backward")]}
    processes = campaign.start(run, 2, "--auto-resume", *WATCHDOG, inside=inside)
    processes[0].join(STUCK)
    processes[1].kill()
    run.codes.append(wait(processes))
    return run.codes[-1] == [EXIT_CODE, KILLED] and any(run.out.glob("stacks-*"))


def _nan(ranks: int) -> Trial:
    """All ranks pass the step over; compared with a run that undoes it by copies of all state."""

    def spoil(campaign: Campaign, run: Run) -> bool:
        campaign.go(run, ranks, inside={ranks - 1: [("nan", {"step": MIDDLE})]})
        return run.codes[-1] == [0] * ranks

    def equal(campaign: Campaign, run: Run) -> bool:
        model = campaign.new()
        undone: Fault = ("undone", {"step": MIDDLE})
        campaign.go(model, ranks, inside={rank: [undone] for rank in range(ranks)})
        (*reached, losses), (*expected, all_losses) = outcome(run), outcome(model)
        shutil.rmtree(model.folder)
        return reached == expected and losses == [x for x in all_losses if x[0] != MIDDLE]

    fault = f"NaN on one rank of {ranks}"
    return Trial(fault=fault, where=AT_MIDDLE, ranks=ranks, spoil=spoil, equal=equal)


# ---- The rest ------------------------------------------------------------------------------------


def _clock(hours: float) -> Trial:
    """Set the clock wrong; the resumed run has the right time again."""

    def spoil(campaign: Campaign, run: Run) -> bool:
        jump: Fault = ("clock", {"step": 3, "seconds": 3600 * hours})
        campaign.go(run, inside={0: [jump, _signal(signal.SIGTERM, "data")]})
        return run.codes[-1] == [SAVED]

    return Trial(fault="clock jump", where=f"{hours:+g} h at step 3", spoil=spoil)


def _two_runs(campaign: Campaign, run: Run) -> bool:
    """Start a second run in the folder: it is refused, and the first does not notice."""
    go = run.folder / "go"
    first = campaign.start(run, 1, inside={0: [("pause", {"step": MIDDLE, "until": go})]})
    while not go.with_suffix(".asked").exists() and first[0].is_alive():
        time.sleep(0.05)
    campaign.go(run, 1, "--resume")
    campaign.go(run, 1, "--auto-resume")
    go.touch()
    run.codes.append(wait(first))
    return run.codes == [[REFUSED], [REFUSED], [0]]


def _other_ranks(before: int, now: int) -> Trial:
    """Resume on other ranks, which add up in another order, so what is loaded is compared."""

    def spoil(campaign: Campaign, run: Run) -> bool:
        campaign.go(run, before, inside={0: [_signal(signal.SIGTERM, "data")]})
        _note(run, "saved").write_text(json.dumps(outcome(run)[1]))
        look = {rank: [("dump", {"path": _note(run, f"loaded-{rank}")})] for rank in range(now)}
        campaign.go(run, now, inside=look)
        return run.codes == [[SAVED] * before, [0] * now]

    def equal(campaign: Campaign, run: Run) -> bool:
        names = ["saved", *(f"loaded-{rank}" for rank in range(now))]
        saved, *loaded = (json.loads(_note(run, name).read_text()) for name in names)
        return outcome(run)[0] == STEPS and all(each == saved for each in loaded)

    where = f"{before} to {now}, {AT_MIDDLE}"
    return Trial(fault="other number of ranks", where=where, ranks=now, spoil=spoil, equal=equal)


def _note(run: Run, name: str) -> Path:
    return run.folder / f"{name}.json"
