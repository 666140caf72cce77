"""Every number of every recipe's config is finite and in its range, or refused by its name."""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from typeguard import TypeCheckError, check_type

from m3i_fast.cli import main, train
from m3i_fast.config import TrainConfig
from m3i_fast.config.columns import ColumnConfig
from m3i_fast.config.data import LoaderConfig
from m3i_fast.config.fields import THREADS
from m3i_fast.config.fine_tuning import FineTuningConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.recipes import demo, recipes

ROOT = Path(__file__).resolve().parents[2]
NOT_FINITE = [math.nan, math.inf, -math.inf]


def nodes(value: Any) -> Iterator[Any]:
    """Every config of a tree, the root included."""
    if is_dataclass(value):
        yield value
        for field in fields(value):
            yield from nodes(getattr(value, field.name))
    elif isinstance(value, tuple):
        for each in value:
            yield from nodes(each)


def kinds(hint: Any) -> set[Any]:
    """The types that a field may hold, in tuples and unions as well."""
    if get_origin(hint) in (tuple, Union, types.UnionType):
        return {kind for each in get_args(hint) for kind in kinds(each)}
    return {hint}


def fields_of(node: Any, kind: type) -> Iterator[tuple[str, bool]]:
    """(name, whether it is a tuple) of the fields that hold numbers of this type."""
    for name, hint in get_type_hints(type(node)).items():
        if name in node.__dataclass_fields__ and kind in kinds(hint):
            options = get_args(hint) if type(None) in get_args(hint) else (hint,)
            yield name, any(get_origin(option) is tuple for option in options)


TREES = {name: list(nodes(build())) for name, build in recipes().items()}
KINDS = {type(node): node for tree in TREES.values() for node in tree}
KINDS[FineTuningConfig] = FineTuningConfig()  # of a measure, and of no run
KINDS[ColumnConfig] = ColumnConfig(name="column", kind="class", num_names=2)  # of data


def test_the_trees_hold_all_configs() -> None:
    sources = [
        p.read_text()
        for top in ("m3i_fast", "pipelines")
        for p in (ROOT / top).rglob("*.py")
        if p.parent.name != "folder_code"  # has a config of transformers
    ]
    named = {name for text in sources for name in re.findall(r"^class (\w+Config)\b", text, re.M)}
    assert named | {"Term"} == {kind.__name__ for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_no_field_takes_what_is_of_another_type(kind: type) -> None:
    """A word that none of a choice's branches knows would take the last of them."""
    node = KINDS[kind]
    for name in node.__dataclass_fields__:
        for wrong in (object(), "no-such-word", ("no-such-word",), 1.5, True):
            if _takes(get_type_hints(kind)[name], wrong):
                continue
            with pytest.raises(ValueError, match=rf"\b{name}: expected .*, got "):
                replace(node, **{name: wrong})


def _takes(hint: Any, value: object) -> bool:
    """Whether typeguard takes a value for a field."""
    try:
        check_type(value, hint)
    except TypeCheckError:
        return False
    return True


@pytest.mark.parametrize("recipe", TREES)
def test_no_float_is_nan_or_infinite(recipe: str) -> None:
    tried = set()
    for node in TREES[recipe]:
        for name, is_tuple in fields_of(node, float):
            for value in NOT_FINITE:
                wrong = (*getattr(node, name)[:1], value) if is_tuple else value
                told = rf"{name}: expected a finite number, got {re.escape(str(wrong))}"
                with pytest.raises(ValueError, match=told):
                    replace(node, **{name: wrong})
                tried.add((type(node).__name__, name))
    assert {("OptimConfig", "lr"), ("OptimConfig", "eps"), ("Term", "weight")} <= tried
    assert {("ObjectiveConfig", "sigma"), ("ViewConfig", "scale")} <= tried


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_int_has_a_range_and_is_held_to_it(kind: type) -> None:
    node, hints = KINDS[kind], get_type_hints(kind, include_extras=True)
    for name, is_tuple in fields_of(node, int):
        metadata = getattr(hints[name], "__metadata__", ())
        [allowed] = [each for each in metadata if isinstance(each, range)]
        for value in (allowed.start - 1, allowed.stop, 2**70):
            wrong = (value,) * 4 if is_tuple else value
            told = rf"{name}: expected .*, got {re.escape(str(wrong))}"
            with pytest.raises(ValueError, match=told):
                replace(node, **{name: wrong})


@pytest.mark.parametrize("value", [1.5, 8.0, "8"])
def test_a_count_is_a_whole_number(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"num_threads: expected a whole number, got {value!r}"):
        LoaderConfig(num_threads=value)


def test_a_range_says_what_it_allows() -> None:
    with pytest.raises(ValueError, match=r"^num_threads: expected 1 to 1024, got 1025$"):
        LoaderConfig(num_threads=THREADS.stop)
    with pytest.raises(ValueError, match=r"^log_every: expected >= 1, got 0$"):
        replace(demo(), log_every=0)
    with pytest.raises(ValueError, match=r"^parallel\.shard: expected -1 or >= 1, got 0$"):
        ParallelConfig(shard=0)
    with pytest.raises(ValueError, match=r"^mlp_ratio: expected 0 < ratio <= 64\.0, got 1e\+30$"):
        ViTConfig(mlp_ratio=1e30)


# ---- Files and flags -----------------------------------------------------------------------------


def _file(folder: Path, path: str, value: Any) -> Path:
    """The demo's config with one value changed."""
    tree = json.loads(demo().to_json())
    *parents, name = path.split(".")
    node = tree
    for parent in parents:
        node = node[int(parent) if parent.isdecimal() else parent]
    assert name in node
    node[name] = value
    file = folder / "config.json"
    file.write_text(json.dumps(tree))
    return file


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("optim.lr", -1.0, "optim.lr: expected > 0, got -1.0"),
        ("optim.lr", math.nan, "optim.lr: expected a finite number, got nan"),
        ("optim.lr", "fast", "expected a number, got 'fast' @ config.optim.lr"),
        ("ema.momentum", 1.5, "ema.momentum: expected 0 <= momentum <= final_momentum <= 1, got"),
        (
            "objective.terms.1.weight",
            math.inf,
            "objective.terms.1.weight: expected a finite number, got inf",
        ),
        (
            "data.global_views.scale",
            [0.5, 7],
            "data.global_views.scale: expected 0 < low <= high <= 1",
        ),
        ("data.num_threads", 10**12, "data.num_threads: expected 1 to 1024, got 1000000000000"),
        ("num_steps", 3.7, "expected a whole number, got 3.7 @ config.num_steps"),
        ("num_steps", True, "expected a whole number, got True @ config.num_steps"),
        ("compile", "false", "expected true or false, got 'false' @ config.compile"),
        ("num_steps", 0, "num_steps: expected 1 to 50000000, got 0"),
        ("parallel.shard", 0, "parallel.shard: expected -1 or >= 1, got 0"),
        ("vision.dim", 130, "vision.dim: expected a multiple of num_heads = 4, got 130"),
        ("precision", "fp7", "fp7 not in literal"),
    ],
)
def test_a_file_keeps_the_reason_and_names_the_field(
    path: str, value: Any, told: str, tmp_path: Path
) -> None:
    file = _file(tmp_path, path, value)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: .*{re.escape(told)}"):
        TrainConfig.load(file)


def test_the_config_of_an_old_run_says_the_mean_that_it_had(tmp_path: Path) -> None:
    tree = json.loads(demo().to_json())
    for term in tree["objective"]["terms"]:
        del term["mean"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree))
    read = TrainConfig.load(path).objective.terms
    means = {term.target: term.mean for term in read}
    assert means == {"features": "batch", "category": "members", "caption": "members"}


def test_a_whole_number_is_a_number(tmp_path: Path) -> None:
    loaded = TrainConfig.load(_file(tmp_path, "optim.weight_decay", 1))
    assert loaded.optim.weight_decay == 1.0 and type(loaded.optim.weight_decay) is float


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("--objective.terms.intra.weight", "nan", "expected a finite number, got nan"),
        ("--optim.clip-grad-norm", "nan", "expected a finite number, got nan"),
        ("--vision.mlp-ratio", "inf", "expected a finite number, got inf"),
        ("--num-steps", "10000000000", "expected 1 to 50000000, got 10000000000"),
        ("--num-steps", "ten", "expected a whole number, got 'ten'"),
        (
            "--precision",
            "fp7",
            "expected one of auto, fp32, bf16, fp8_current, fp8_delayed, "
            "fp8_block, mxfp8, got 'fp7'. Did you mean fp32?",
        ),
    ],
)
def test_a_flag_is_refused_before_anything_runs(
    flag: str, value: str, told: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = main(["train", "demo", "--out", str(tmp_path / "run"), flag, value])
    assert code == 2 and capfd.readouterr().err == f"error: {flag}: {told}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["max_hours", "watchdog_minutes"])
def test_limits_of_time_may_be_infinite_and_no_less(name: str) -> None:
    command = train.parse(["demo"])
    assert getattr(replace(command, **{name: math.inf}), name) == math.inf
    for wrong in (math.nan, -math.inf, 0.0):
        with pytest.raises(ValueError, match=rf"^{name}: expected > 0, got"):
            replace(command, **{name: wrong})
