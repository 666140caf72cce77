"""Flags that are wrong are told in a line, with the one that was meant; help is short."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3i_fast.cli import main, train
from m3i_fast.config import LoaderConfig, OptimConfig, ViewConfig
from m3i_fast.flags import (
    check_flags,
    flag_of,
    flags_of,
    help_of,
    help_text,
    numbered,
    typed_flags,
)
from m3i_fast.recipes import demo, recipes


def command(recipe: str = "demo") -> train.TrainCommand:
    return train.TrainCommand(config=recipes()[recipe](), out=Path("runs/x"))


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--optim.learning-rate", "1"],
         "unknown flag --optim.learning-rate. Did you mean --optim.lr?"),
        (["--lr", "1"], "unknown flag --lr. Did you mean --optim.lr?"),
        (["--batch-size=8"], "unknown flag --batch-size. Did you mean --data.batch-size?"),
        (["--data.batchsize", "8"],
         "unknown flag --data.batchsize. Did you mean --data.batch-size?"),
        (["--no-lr"], "unknown flag --no-lr. Did you mean --optim.lr?"),
        (["--no-optim.lr"], "unknown flag --no-optim.lr. Did you mean --optim.lr?"),
        (["--precision", "bf61"], "--precision: expected one of auto, fp32, bf16, fp8_current, "
         "fp8_delayed, fp8_block, mxfp8, got 'bf61'. Did you mean bf16?"),
        (["--num-steps", "1e3"], "--num-steps: expected a whole number, got '1e3'"),
        (["--optim.lr", "fast"], "--optim.lr: expected a number, got 'fast'"),
        (["--optim.lr"], "--optim.lr: expected a value: X"),
        (["--cuda-graphs", "--resume"], "--cuda-graphs: expected a value: none|modules|step"),
        (["--no-cuda-graphs"], "unknown flag --no-cuda-graphs. Did you mean --cuda-graphs?"),
        (["--optim.betas", "0.9"], "--optim.betas: expected 2 values, got 1"),
        (["--seed", "1", "2"], "unexpected argument '2': a value stands after its --flag"),
        (["--vision.channels", "8"], "unknown flag --vision.channels."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_wrong_flag_is_told_in_a_line(argv: list[str], told: str) -> None:
    with pytest.raises(ValueError) as refused:
        check_flags(argv, flags_of(command()))
    assert str(refused.value).startswith(told) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "argv",
    [
        ["--optim.lr", "1e-3", "--num_steps", "10", "--seed=-1"],
        ["--compile", "--no-deterministic", "--resume", "--cuda-graphs", "step"],
        ["--optim.betas", "0.9", "0.99", "--optim.eps", "None"],
        ["--objective.terms.0.weight", "2", "--objective.teacher", "none"],
        ["--data.local-views", "none"],
        ["--data.local-views.size", "32", "--optim.lr", "1"],
        ["--data.path", "some/where", "--keep-best", "loss/total"],
        ["--data.path", "some:where", "--objective.teacher", "timm:vit_small", "--seed", "1"],
    ],
    ids=" ".join,
)
def test_what_may_be_typed_is_taken(argv: list[str]) -> None:
    check_flags(argv, flags_of(command()))


def test_a_term_is_told_by_its_name() -> None:
    names = [term.name for term in demo().objective.terms]
    asked = ["--objective.terms.category.weight", "0", "--objective.terms.caption.weight=3"]
    terms = train.parse(["demo", *asked]).config.objective.terms
    weights = {term.name: term.weight for term in terms}
    assert [*weights] == names and (weights["category"], weights["caption"]) == (0, 3)
    by_place = f"--objective.terms.{names.index('caption')}.weight"
    assert train.parse(["demo", *asked[:2], by_place, "3"]).config.objective.terms == terms
    siglip2 = train.parse(["demo_siglip2", "--objective.terms.caption-tokens.weight", "2"])
    assert siglip2.config.objective.terms[1].weight == 2
    with pytest.raises(ValueError, match=r"unknown flag --objective.terms.captions.weight"):
        train.parse(["demo", "--objective.terms.captions.weight", "2"])


def test_flags_reach_the_config() -> None:
    asked = ["--optim.lr", "0.5", "--optim.betas", "0.5", "0.6", "--no-async-checkpoint"]
    found = train.parse(["demo", *asked, "--data.local-views", "none", "--num_steps", "7"])
    cfg = found.config
    assert (cfg.optim.lr, cfg.optim.betas, cfg.num_steps) == (0.5, (0.5, 0.6), 7)
    assert not cfg.async_checkpoint and cfg.data.local_views is None
    assert train.parse(["demo"]).config == demo()


def test_everything_that_does_not_fit_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--optim.lr", "-1", "--parallel.shard", "2", "--max-hours", "0", "--vision.depth", "0"]
    assert main(["train", "demo", *asked]) == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "error: 2 settings are wrong:"
    assert [line.split(":")[0].strip() for line in lines] == [
        "--vision.depth",
        "--optim.lr",
    ]  # what may be computed of a depth is not looked at
    assert main(["train", "demo", *asked[:6]]) == 2
    names = [line.split(":")[0].strip() for line in capsys.readouterr().err.splitlines()[1:]]
    assert names == ["--optim.lr", "--optim.matrices", "--max-hours"]


def test_the_short_help_is_about_twenty_flags_with_the_recipes_values(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "demo", "--help"]) == 0
    said = capsys.readouterr().out
    flags = [line.split()[0] for line in said.splitlines() if line.startswith("  --")]
    assert 20 <= len(flags) <= 26 and len(set(flags)) == len(flags)
    assert "--num-steps N  (default 2000)" in said and "Peak learning rate, for this batch" in said
    assert "m3i-fast train demo --help-all" in said


def test_all_flags_are_under_help_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "demo", "--help-all"]) == 0
    said = capsys.readouterr().out
    typed = [line.split()[0].strip(",") for line in said.splitlines() if line.startswith("  --")]
    assert "--data.augment, --data.no-augment  (default on)" in said
    assert "--objective.terms.category.weight" in typed
    assert sorted(numbered(typed, command())) == sorted(flags_of(command()))


@pytest.mark.parametrize("recipe", ["demo", "demo_dinov3", "demo_internimage"])
def test_every_switch_is_turned_on_and_off(recipe: str) -> None:
    """As they are typed, of sections as well: --data.no-augment, and not --no-data.augment."""
    flags = flags_of(command(recipe))
    switches = [name for name, flag in flags.items() if flag.is_switch and flag.default]
    assert {"--data.augment", "--async-checkpoint"} <= {*switches}
    for name in switches:
        section, dot, leaf = name.removeprefix("--").rpartition(".")
        off = f"--{section}{dot}no-{leaf}"
        check_flags([off], flags)
        assert name in typed_flags([off])
    found = train.parse([recipe, "--data.no-augment", "--data.no_alternates"]).config.data
    assert (found.augment, found.alternates) == (False, False)
    assert train.parse([recipe, "--data.augment"]).config.data.augment
    with pytest.raises(ValueError, match=r"--no-data.augment. Did you mean --data.augment"):
        train.parse([recipe, "--no-data.augment"])


def test_errors_tell_a_term_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    for typed in ("2", "category"):
        assert main(["train", "demo", f"--objective.terms.{typed}.weight", "-1"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: --objective.terms.category.weight: expected")
    assert main(["train", "demo", "--objective.terms.category.weights", "1"]) == 2
    assert "Did you mean --objective.terms.category.weight?" in capsys.readouterr().err


def test_local_views_are_there_once_a_flag_of_them_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.parse(["vit_ti"]).config.data.local_views is None
    asked = ["vit_ti", "--data.local_views.size=96", "--data.local-views.count", "6"]
    views = train.parse(asked).config.data.local_views
    assert views == ViewConfig(size=96, count=6)
    for none in (["--data.local-views", "None"], ["--data.local_views=none"]):
        assert train.parse(["demo", *none, "--seed", "3"]).config.data.local_views is None
        assert train.parse(["vit_ti", *none]).config == train.parse(["vit_ti"]).config
    assert main(["train", "demo", "--data.local-views", "none", *asked[1:]]) == 2
    said = capsys.readouterr().err
    assert "--data.local-views.count: expected without --data.local-views none" in said
    assert "--data.local-views.size: expected without" in said
    assert main(["train", "demo", "--data.local-views", "6"]) == 2
    assert "--data.local-views: expected none, got '6'" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["demo", "demo_internimage", "vit_b", "m3i_internimage_h"])
def test_every_recipe_has_the_flags_of_the_short_help(recipe: str) -> None:
    text = help_text(command(recipe), train.FLAGS)
    assert all(flag_of(path) in text for paths in train.FLAGS.values() for path in paths)


def test_help_is_what_stands_under_a_field() -> None:
    assert help_of(OptimConfig)["muon_lr"] == "Muon's peak learning rate; it follows lr's schedule."
    assert help_of(LoaderConfig).keys() == set(LoaderConfig.__dataclass_fields__)
