"""Recipes are found by grep, by `m3i-fast recipes`, and by a name that is almost right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from m3i_fast.cli import main
from m3i_fast.objectives.methods import METHODS
from m3i_fast.recipes import GROUPS, RECIPES, needs_of, recipes, sentence_of
from m3i_fast.recipes.catalogue import whole_batch

SOURCES = Path(__file__).resolve().parents[2] / "m3i_fast" / "recipes"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_function_of_its_name(name: str) -> None:
    assert RECIPES[name].__name__ == name
    text = "".join(path.read_text() for path in SOURCES.glob("*.py"))
    assert len(re.findall(rf"^def {name}\(", text, re.M)) == 1


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_is_and_needs(name: str) -> None:
    sentence, needs = sentence_of(RECIPES[name]), needs_of(RECIPES[name])
    assert sentence.endswith(".") and len(sentence.split()) >= 5
    assert len(needs.split("; ")) == 3  # data, cards, memory
    batch = re.search(r"(\d+) pictures a card", needs)
    if batch is not None:
        assert int(batch[1]) == RECIPES[name]().data.batch_size
        return
    tokens = re.search(r"([\d,]+) tokens a card", needs)
    if tokens is not None:
        assert int(tokens[1].replace(",", "")) == RECIPES[name]().data.max_tokens_per_batch
        return
    assert name.startswith("demo")


@pytest.mark.parametrize("name", RECIPES)
def test_epochs_that_a_recipe_promises_are_of_all_its_cards(name: str) -> None:
    cfg, batch = RECIPES[name](), whole_batch(RECIPES[name])
    promised = re.search(r"for (\d+) epochs of ImageNet", sentence_of(RECIPES[name]))
    if promised is not None:
        assert batch is not None
        assert cfg.num_steps * batch / 1_281_167 == pytest.approx(int(promised[1]), rel=2e-3)
    if name.startswith(("m3i_", "one_stage_")):
        assert batch is not None
        assert cfg.optim.lr == pytest.approx(1e-3 * batch / 4096)


def test_the_verb_lists_every_recipe_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    said = capsys.readouterr().out
    listed = re.findall(r"^  (\w+)", said, re.M)
    assert sorted(listed) == sorted(recipes())
    for title, makes in GROUPS.items():
        assert f"\n{title}\n" in f"\n{said}"
        assert all(sentence_of(make) in said and needs_of(make) in said for make in makes)
    assert all(method.title in said for method in METHODS.values())


def test_a_name_that_is_almost_right_finds_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "m3i_vit_bb_h100"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith("Did you mean m3i_vit_b_h100?") and len(said) < 200
