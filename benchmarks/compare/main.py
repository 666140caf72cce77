"""Is this version slower, or faster, than another? Exit code 1 on an alarm.

    m3i-fast bench compare SUBJECT                   the ledger's rows of this commit and of another
    m3i-fast bench compare SUBJECT --against REF     both versions in turns, here and now
    m3i-fast bench compare step --against REF --recipes demo m3i_vit_s       whole training steps
    m3i-fast bench compare SUBJECT --self-test 20    how often the gate errs on this machine

Only rows of one machine class are compared, and only those that measured the same. --against builds
the other commit and takes samples of both in turns, which leaves out what a busy machine does to
both: it is the fair one, for the ops (`m3i_fast/op_registry.py` has their work) and for recipes'
steps (steps.py), whose rows go to the ledger. --self-test compares this version with itself, and
with itself doing a tenth of the work again; its row goes to the ledger. gate.py says when a
difference is an alarm, docs/measure/comparing.md what was measured.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from m3i_fast.benchmarks.compare import steps
from m3i_fast.benchmarks.compare.gate import Verdict, judge, judge_in_looks
from m3i_fast.benchmarks.compare.versions import Plan, Version, built, sample_in_turns
from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.config import TrainConfig
from m3i_fast.op_registry import OPS
from m3i_fast.recipes import recipes
from m3i_fast.terminal import make_console

SUBJECT = "gate"  # of the rows of --self-test
STEP, OF_STEPS = "step", "step_versions"  # with --against: its subject, and that of its rows
OURS = "m3i_fast"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    subject: Annotated[str, tyro.conf.Suppress]
    """A subject of the ledger; with --against or --self-test the name of an op, or step."""
    against: str | None = None
    """A commit, tag or branch: build it and measure both versions in turns."""
    recipes: tuple[str, ...] = ("demo",)
    """With step --against: whose training steps are compared, one after the other."""
    batch_size: int = 64
    """Pictures of such a step."""
    curve: int = 12
    """First steps whose losses both versions have to share; they are not timed."""
    loss_bound: float = 1e-5
    """The most that these losses may differ by, relative to the other version's: rounding."""
    baseline: str | None = None
    """Without --against: the commit whose rows are the baseline; the newest other one if absent."""
    self_test: int = 0
    """So many comparisons of this version with itself, and as many with a planted slowdown."""
    planted: float = 0.1
    """Share of the work that --self-test does again, in tenths."""
    alpha: float = 0.01
    """Chance of an alarm on versions that are equally fast; shared by all rows compared."""
    threshold: float = 0.05
    """The smallest difference that counts, as a share."""
    pairs: int = 6
    """Pairs of processes that take turns; as many anew at each look."""
    looks: int = 5
    """So often at most, while the interval neither clears nor keeps within the threshold."""
    samples: int = 80
    """Of each process."""
    sample_ms: float = 5.0
    """What a sample lasts at least."""
    threads: int = 1
    """Of each process. One process works at a time."""
    record: bool = True
    """Append rows to the ledger: of steps to benchmarks/results/step_versions.jsonl, of --self-test
    to gate.jsonl."""

    def __post_init__(self) -> None:
        for name in ("pairs", "looks", "samples", "threads", "curve"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha: expected a probability between 0 and 1, got {self.alpha}")
        for name in ("threshold", "self_test", "planted", "loss_bound"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if abs(10 * self.planted - round(10 * self.planted)) > 1e-9:
            raise ValueError(f"planted: expected whole tenths, got {self.planted}")
        if sum(map(bool, (self.against, self.baseline, self.self_test))) > 1:
            raise ValueError("expected one of --against, --baseline and --self-test")
        names = [op.name for op in OPS] + [STEP] * bool(self.against)
        if (self.against or self.self_test) and self.subject not in names:
            raise ValueError(
                f"subject: expected one of {', '.join(names)} for measuring in turns, "
                f"got {self.subject!r}"
            )
        if self.against and self.subject == STEP:
            self._check_recipes()

    def _check_recipes(self) -> None:
        if not self.recipes:
            raise ValueError("recipes: expected one or more, as demo m3i_vit_s, got none")
        for name in self.recipes:
            if name not in recipes():
                raise ValueError(f"recipes: expected some of {', '.join(recipes())}, got {name!r}")

    @property
    def plan(self) -> Plan:
        return Plan(self.subject, self.pairs, self.samples, self.sample_ms, self.threads)


# ---- Rows of the ledger --------------------------------------------------------------------------


def compare_rows(cfg: Config) -> dict[str, Verdict]:
    """Return verdicts by what was measured. Raises ValueError where no rows are comparable."""
    rows = [row for row in ledger.read_rows(cfg.subject) if OURS in _timings(row)]
    if not rows:
        raise ValueError(
            f"subject: expected one with timings of {OURS} in the ledger, got {cfg.subject!r}; "
            f"there are {', '.join(ledger.subjects())}"
        )
    here = ledger.make_row(cfg.subject, {})
    own = [row for row in rows if row["commit"] == here["commit"]]
    if not own:
        raise ValueError(
            f"no row of {cfg.subject} is of this commit, {here['commit']}: m3i-fast bench "
            f"{cfg.subject} appends some"
        )
    classes = {row["machine_class"] for row in own}
    others = [row for row in rows if row["commit"] not in (here["commit"], None)]
    if cfg.baseline:
        others = [row for row in others if row["commit"].startswith(cfg.baseline)]
    usable = [row for row in others if row["machine_class"] in classes]
    if not usable:
        raise ValueError(_nothing_to_compare(cfg, classes, others))
    commit = cfg.baseline or usable[-1]["commit"]
    baseline = _newest_by_settings(row for row in usable if row["commit"].startswith(commit))
    candidate = _newest_by_settings(own)
    shared = [key for key in candidate if key in baseline]
    if not shared:
        raise ValueError(
            f"no row of {cfg.subject} of {commit} measured what rows of this commit did: settings "
            f"differ in {', '.join(sorted(_differing(baseline, candidate)))}"
        )
    return {key: _of_rows(cfg, baseline[key], candidate[key], len(shared)) for key in shared}


def _timings(row: ledger.Row) -> Mapping[str, Any]:
    timings: Mapping[str, Any] = row["figures"].get("timings", {})
    return timings


def _nothing_to_compare(cfg: Config, classes: set[str], others: list[ledger.Row]) -> str:
    wanted = f"commit {cfg.baseline}" if cfg.baseline else "another commit"
    if not others:
        return f"no row of {cfg.subject} is of {wanted}: measure it with a checkout of it"
    machine_classes = {row["machine_class"] for row in others}
    return (
        f"rows of {cfg.subject} of {wanted} are of other machines: expected "
        f"{' or '.join(sorted(classes))}, got {' and '.join(sorted(machine_classes))}; measure "
        "both versions here with --against"
    )


def _newest_by_settings(rows: Iterator[ledger.Row] | list[ledger.Row]) -> dict[str, ledger.Row]:
    compared = {}
    for row in rows:
        settings = {"class": row["machine_class"], **ledger.settings_of(row)}
        compared[json.dumps(settings, sort_keys=True)] = row
    return compared


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> set[str]:
    """Names of settings that no row of one has as some row of the other."""
    pairs = [(json.loads(left), json.loads(right)) for left in a for right in b]
    return min(
        ({k for k in {*x, *y} if x.get(k) != y.get(k)} for x, y in pairs), key=len, default=set()
    )


def _of_rows(
    cfg: Config, baseline: ledger.Row, candidate: ledger.Row, num_compared: int
) -> Verdict:
    samples = [_timings(row)[OURS].get("samples_ms") for row in (baseline, candidate)]
    for row, taken in zip((baseline, candidate), samples, strict=True):
        if not taken:
            raise ValueError(
                f"the row of {cfg.subject} of {ledger.commit_of(row)} at {row['time']} has no "
                "samples, as rows of before they were kept: use --against, which measures both"
            )
    return judge(
        [samples[0]],
        [samples[1]],
        alpha=cfg.alpha / num_compared,
        threshold=cfg.threshold,
        in_turns=False,
    )


# ---- Two versions --------------------------------------------------------------------------------


def compare_versions(cfg: Config, baseline: Version, candidate: Version, seed: int = 0) -> Verdict:
    """Sample both in turns, and judge; again with new processes, until that is settled."""
    take = partial(sample_in_turns, cfg.plan, (baseline, candidate))
    return judge_in_looks(
        take, looks=cfg.looks, alpha=cfg.alpha, threshold=cfg.threshold, seed=seed
    )


def configs_of(cfg: Config) -> dict[str, TrainConfig]:
    """Return by name the recipes whose steps are compared; ValueError as `steps.config_of`."""
    num_steps = cfg.curve + cfg.samples
    return {
        recipe: steps.config_of(recipe, batch_size=cfg.batch_size, num_steps=num_steps)
        for recipe in cfg.recipes
    }


def compare_recipes(
    cfg: Config,
    configs: Mapping[str, TrainConfig],
    versions: tuple[Version, Version],
    console: Console,
) -> dict[str, Verdict]:
    """Compare the steps of each recipe; print what they take, and append it to the ledger."""
    judge_steps = partial(
        judge_in_looks,
        looks=cfg.looks,
        alpha=cfg.alpha / len(cfg.recipes),
        threshold=cfg.threshold,
    )
    verdicts = {}
    for recipe, train in configs.items():
        compared = steps.compare_steps(
            recipe,
            train,
            cfg.plan,
            versions,
            curve=cfg.curve,
            loss_bound=cfg.loss_bound,
            judge=judge_steps,
        )
        console.print(steps.table(compared))
        if cfg.record:
            path = ledger.append_row(OF_STEPS, compared.figures, config=train)
            console.print(f"a row appended to {path}")
        verdicts[recipe] = compared.verdict
    return verdicts


def self_test(cfg: Config, console: Console) -> dict[str, Any]:
    """Return a row's figures: alarms on this version against itself, and against a slower one."""
    tables: dict[str, Any] = {}
    kinds = {"unchanged": Version(), "planted": Version(planted=cfg.planted)}
    for name, candidate in kinds.items():
        verdicts, begun = [], time.monotonic()
        for number in range(cfg.self_test):
            verdicts.append(compare_versions(cfg, Version(), candidate, seed=number))
            console.print(_line(f"{name} {number + 1}", verdicts[-1]), highlight=False)
        tables[name] = {
            "comparisons": len(verdicts),
            "slower": sum(verdict.alarm == "slower" for verdict in verdicts),
            "faster": sum(verdict.alarm == "faster" for verdict in verdicts),
            "ratios": [round(verdict.ratio, 4) for verdict in verdicts],
            "intervals": [[round(v.low, 4), round(v.high, 4)] for v in verdicts],
            "pairs": [verdict.num_groups for verdict in verdicts],
            "seconds_a_comparison": (time.monotonic() - begun) / len(verdicts),
        }
    settings = {name: value for name, value in asdict(cfg.plan).items() if name != "steps"}
    settings |= {
        "looks": cfg.looks,
        "alpha": cfg.alpha,
        "threshold": cfg.threshold,
        "slowdown": cfg.planted,
    }
    return settings | tables


# ---- Words ---------------------------------------------------------------------------------------


def _line(name: str, verdict: Verdict) -> str:
    said = verdict.alarm or "no alarm"
    interval = f"{verdict.low:.3f} to {verdict.high:.3f}"
    return f"{name}: {verdict.ratio:.3f} ({interval}), {said}, {verdict.num_groups} pairs"


def table(title: str, verdicts: Mapping[str, Verdict]) -> Table:
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "time, x baseline", "interval", "p", "verdict"):
        shown.add_column(column, justify="left" if column in ("", "verdict") else "right")
    for name, verdict in verdicts.items():
        shown.add_row(
            _label(name),
            f"{verdict.ratio:.3f}",
            f"{verdict.low:.3f} to {verdict.high:.3f}",
            f"{verdict.p_value:.2g}",
            verdict.alarm or ("equal" if verdict.settled else "not settled"),
        )
    return shown


def _label(key: str) -> str:
    if not key.startswith("{"):
        return key
    settings = json.loads(key)
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name != "class")


def _conclude(console: Console, title: str, verdicts: Mapping[str, Verdict]) -> int:
    console.print(table(title, verdicts))
    alarms = {verdict.alarm for verdict in verdicts.values()}
    if "slower" in alarms:
        console.print("slower than the baseline")
    if "faster" in alarms:
        console.print("faster than the baseline: refresh the baseline by measuring this commit")
    if not all(verdict.settled for verdict in verdicts.values()):
        console.print(
            "not settled: an interval holds the threshold; more --looks of --against narrow it"
        )
    elif alarms == {None}:
        console.print("no difference that counts")
    return 1 if alarms - {None} else 0


def parse(argv: list[str]) -> Config:
    """Return what `SUBJECT --flag value ...` asks for; raises as `read_command`."""
    is_help = bool({"-h", "--help"} & set(argv[:1]))
    if not is_help and (not argv or argv[0].startswith("-")):
        raise ValueError(
            f"expected a subject, one of {', '.join(ledger.subjects())}, got "
            f"{' '.join(argv[:1]) or 'none'}; type m3i-fast bench compare SUBJECT --flag value"
        )
    subject, rest = (OPS[0].name, argv) if is_help else (argv[0], argv[1:])
    default = Config(subject=subject)
    if subject == STEP:  # whose processes are larger and whose samples last longer than an op's
        default = replace(default, pairs=3, looks=3, samples=12)
    return read_command(Config, "compare SUBJECT", rest, default=default)


def main(argv: list[str] | None = None) -> int:
    cfg = parse(sys.argv[1:] if argv is None else argv)
    console = make_console()
    if cfg.self_test:
        figures = self_test(cfg, console)
        if cfg.record:
            console.print(f"a row appended to {ledger.append_row(SUBJECT, figures)}")
        return 0
    if cfg.against:
        configs = configs_of(cfg) if cfg.subject == STEP else {}
        with built(cfg.against) as other:
            if configs:
                verdicts = compare_recipes(cfg, configs, (other, Version()), console)
            else:
                verdicts = {cfg.subject: compare_versions(cfg, other, Version())}
        title = f"{cfg.subject}, this version against {cfg.against}"
        return _conclude(console, title, verdicts)
    return _conclude(console, f"{cfg.subject}, rows of the ledger", compare_rows(cfg))
