"""The matrix: every case whose steady step is counted on the null CUDA runtime.

Each recipe of square views is there: those of the demo in the trainer, those at full size as a step
alone. So is each setting of the demo that changes what a step launches.
"""

from __future__ import annotations

from dataclasses import dataclass

from m3i_fast.objectives.methods import METHODS
from m3i_fast.recipes import RECIPES

BATCH_SIZE = 8  # of every case; launches do not depend on it
TEACHER = "{teacher}"  # in flags: the run of a small teacher, which the runner trains first


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A recipe, its flags, and the machine that it believes to be on."""

    name: str
    recipe: str
    flags: tuple[str, ...] = ()
    """As `m3i-fast train` takes them; TEACHER stands for the teacher's run."""
    card: str = "h100"
    devices: int = 1
    step_alone: bool = False
    """Without a trainer, on weights that nobody drew: for recipes at full size."""


def _demo(setting: str, *flags: str, card: str = "h100", devices: int = 1) -> Case:
    return Case(name=f"demo, {setting}", recipe="demo", flags=flags, card=card, devices=devices)


SETTINGS = (
    _demo("a100", card="a100"),
    _demo("b200", card="b200"),
    _demo("two cards", devices=2),
    _demo("cuda graphs", "--cuda-graphs", "modules"),
    # The step before the steady one is monitored, so that the peak is that of a run.
    _demo("whole-step graph", "--cuda-graphs", "step", "--log-every", "3"),
    _demo("deterministic", "--data.local-views", "none", "--deterministic"),
    _demo("fp32", "--precision", "fp32"),
    _demo(
        "fp8",
        *("--precision", "fp8_current", "--backend", "torchao", "--fp8-min-dim", "16"),
    ),
    _demo("adamw", "--optim.matrices", "adamw"),
    _demo("lamb", "--optim.name", "lamb", "--optim.matrices", "adamw"),
    _demo("lars", "--optim.name", "lars", "--optim.matrices", "adamw"),
    _demo("selective recomputation", "--vision.activation-checkpointing", "selective"),
    _demo("full recomputation", "--vision.activation-checkpointing", "full"),
    Case(  # of terms that compare no rows of two batches
        name="demo, two batches a step, supervised",
        recipe="demo_supervised",
        flags=("--parallel.accumulate", "2"),
    ),
    _demo("gradient caching", "--parallel.chunk", "4"),
    _demo("gradient norm balance", "--objective.balance.mode", "gradient_norm"),
    _demo(
        "gradient norms measured",
        *("--objective.balance.mode", "gradient_norm", "--objective.balance.every", "1"),
    ),
    _demo("uncertainty balance", "--objective.balance.mode", "uncertainty"),
    _demo("guard off", "--guard.spikes", "off"),
)


def _method(name: str) -> Case:
    is_taught = any(term.encoder == "frozen" for term in METHODS[name].terms)
    flags = ("--objective.teacher", TEACHER) if is_taught else ()
    return Case(name=f"demo_{name}", recipe=f"demo_{name}", flags=flags)


# A recipe that is another one compiled launches what that one does, before torch.compile. Of a
# budget of tokens no two steps ask the same, and plan tells the peak of the largest batch.
AT_FULL_SIZE = [
    name
    for name in RECIPES
    if not name.startswith(("demo", "any_shape")) and not name.endswith(("_a100", "_h100"))
]

MATRIX = (
    Case(name="demo", recipe="demo"),
    *SETTINGS,
    Case(name="demo_internimage", recipe="demo_internimage"),
    *(_method(name) for name in METHODS if name != "m3i"),
    *(Case(name=name, recipe=name, step_alone=True) for name in AT_FULL_SIZE),
)
CASES = {case.name: case for case in MATRIX}

# Those that CI counts again and holds to the ledger, and those whose rows have the launches of each
# line, so that a nightly failure names what is new.
IN_CI = ("demo", "demo, cuda graphs", "demo_internimage", "demo_clip", "m3i_vit_b")
GATED = (*IN_CI, "demo, lamb", "demo, gradient caching", "demo_dino")
