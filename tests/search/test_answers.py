"""What the page is told equals what the model's own calls give, computed by NumPy."""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import m3i_fast
from m3i_fast.engine.trainer import Trainer
from m3i_fast.evaluation.dense.correspondence import position_means
from m3i_fast.search import answers as answers_module
from m3i_fast.search.answers import Answers, Forgotten
from m3i_fast.search.features import cached_features
from m3i_fast.search.pictures import Pictures, decode, open_pictures
from tests.shared.engine.small_run import as_clip, small_run


def views_of(model: m3i_fast.Model, pictures: Pictures) -> torch.Tensor:
    every = [decode(pictures.read(row)) for row in range(len(pictures.label))]
    return model.transform.views([torch.from_numpy(each).permute(2, 0, 1) for each in every])


def unit(rows: torch.Tensor) -> NDArray[np.float64]:
    wide = rows.numpy().astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=-1, keepdims=True))


def assert_nearest(answer: dict[str, Any], cosines: NDArray[np.float64]) -> None:
    """The rows are those of the largest cosines, up to pairs that rounding may exchange."""
    rows = [result["row"] for result in answer["results"]]
    best = np.sort(cosines)[::-1][: len(rows)]
    np.testing.assert_allclose(cosines[rows], best, rtol=0, atol=1e-6)
    got = [result["similarity"] for result in answer["results"]]
    np.testing.assert_allclose(got, best, rtol=0, atol=6e-5)


def test_words_find_the_pictures_of_the_nearest_embedding(
    answers: Answers, model: m3i_fast.Model, pictures: Pictures
) -> None:
    words = "a red heart"
    cosines = (
        unit(model.encode_image(views_of(model, pictures))) @ unit(model.encode_text(words))[0]
    )
    answer = answers.search({"words": words})
    assert_nearest(answer, cosines)
    assert len(answer["results"]) == 24 and answer["searched"] == len(pictures.label)
    assert answer["query"] is None and answer["note"] == ""
    assert answer["encode_ms"] > 0 and answer["search_ms"] > 0
    for result in answer["results"]:
        name, captions = pictures.about(result["row"])
        label = int(pictures.label[result["row"]])
        assert result["name"] == name and result["captions"] == list(captions)
        assert result["label"] == (pictures.class_names[label] if label >= 0 else None)
    long = answers.search({"words": "red " * 60, "num": 1})
    assert long["note"] == "The model reads the first 24 tokens of 62."


def test_words_are_embedded_by_a_causal_run(
    dataset: Path, pictures: Pictures, tmp_path: Path
) -> None:
    cfg = as_clip(small_run(dataset, num_steps=1, log_every=1, checkpoint_every=1, num_threads=1))
    Trainer(cfg, tmp_path / "run").train()
    model = m3i_fast.load(tmp_path / "run", device="cpu")
    found = Answers(model, pictures, cached_features(model, pictures, tmp_path), model_name="run")
    images = unit(model.encode_image(views_of(model, pictures)))
    for words in ("a red heart", "red " * 60):
        cosines = images @ unit(model.encode_text([words, "sun"]))[0]
        assert_nearest(found.search({"words": words}), cosines)
    found.close()


def test_a_picture_finds_itself_and_the_nearest_by_its_features(
    answers: Answers, model: m3i_fast.Model, pictures: Pictures
) -> None:
    features = unit(model(views_of(model, pictures)))
    added = answers.add_picture(pictures.read(5))["query"]
    answer = answers.search({"query": added["id"], "num": 40})
    assert_nearest(answer, features @ features[5])
    assert answer["results"][0]["similarity"] == 1 and answer["query"]["id"] == added["id"]
    assert 5 in [r["row"] for r in answer["results"] if r["similarity"] == 1]
    of_row = answers.search({"row": 5, "num": 40})
    assert 5 not in [result["row"] for result in of_row["results"]]
    assert of_row["searched"] == len(pictures.label) - 1 and of_row["query"]["row"] == 5
    shown = added["picture"].partition("base64,")[2]
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown))))
    assert np.array_equal(seen, views_of(model, pictures)[5].permute(1, 2, 0).numpy())


def test_guesses_are_the_classifiers(
    answers: Answers, model: m3i_fast.Model, pictures: Pictures
) -> None:
    chances = model.classify(views_of(model, pictures)).softmax(-1)
    best = chances[3].topk(5)
    told = answers.add_picture(pictures.read(3))["query"]["guesses"]
    assert [guess["name"] for guess in told] == [model.class_names[i] for i in best.indices]
    np.testing.assert_allclose([g["probability"] for g in told], best.values, atol=6e-5)
    for result in answers.search({"row": 3})["results"]:
        chance, number = chances[result["row"]].max(0)
        assert result["guess"]["name"] == model.class_names[number]
        assert abs(result["guess"]["probability"] - chance) < 6e-5


def test_a_class_is_a_filter(answers: Answers, pictures: Pictures) -> None:
    about = answers.about()
    assert not about["by_guess"]
    counts = {c["name"]: c["pictures"] for c in about["classes"]}
    numbers, of_each = np.unique(pictures.label[pictures.label >= 0], return_counts=True)
    named = [pictures.class_names[n] for n in numbers]
    assert counts == dict(zip(named, of_each.tolist(), strict=True))
    assert list(counts) == sorted(counts)
    for entry in about["classes"]:
        answer = answers.search({"words": "a tree", "class": entry["id"], "num": 96})
        assert {result["label"] for result in answer["results"]} == {entry["name"]}
        assert len(answer["results"]) == min(answer["searched"], 96) == min(entry["pictures"], 96)


def test_pictures_without_labels_are_filtered_by_guess(
    model: m3i_fast.Model, folder: Path, tmp_path: Path
) -> None:
    with open_pictures(folder / "cat", None, tmp_path) as alone:
        features = cached_features(model, alone, tmp_path)
        found = Answers(model, alone, features, model_name="m")
        about = found.about()
        assert about["by_guess"] and sum(c["pictures"] for c in about["classes"]) == 4
        for entry in about["classes"]:
            results = found.search({"row": 0, "class": entry["id"]})["results"]
            assert {result["guess"]["name"] for result in results} <= {entry["name"]}
        found.close()


def test_damaged_pictures_are_neither_found_nor_shown(
    model: m3i_fast.Model, folder: Path, tmp_path: Path
) -> None:
    with open_pictures(folder, None, tmp_path) as opened:
        features = cached_features(model, opened, tmp_path)
        found = Answers(model, opened, features, model_name="m")
        assert found.about()["pictures"] == 7
        assert "1 pictures cannot be read" in found.about()["notes"]
        answer = found.search({"words": "a dog", "num": 96})
        assert sorted(result["row"] for result in answer["results"]) == list(range(7))
        for call in (found.thumbnail, found.picture, lambda row: found.search({"row": row})):
            for row in (7, 8, 10**9):
                with pytest.raises(Forgotten, match=f"there is no picture {row}"):
                    call(row)
        (folder / "cat" / "0.jpg").rename(folder / "moved")
        try:
            with pytest.raises(Forgotten, match="picture 0 is gone: No such file"):
                found.picture(0)
        finally:
            (folder / "moved").rename(folder / "cat" / "0.jpg")
            found.close()


def test_a_picture_that_is_gone_hides_no_other(
    model: m3i_fast.Model, folder: Path, tmp_path: Path
) -> None:
    """Its patches are None; where its name cannot be read, as in a damaged tar, this is told."""
    copy = tmp_path / "copy"
    shutil.copytree(folder / "cat", copy)
    with open_pictures(copy, None, tmp_path) as opened:
        found = Answers(model, opened, cached_features(model, opened, tmp_path), model_name="m")
        query = found.search({"row": 0})["query"]["id"]
        next(copy.glob("2*")).unlink()
        answer = found.patches({"query": query, "cell": 0, "rows": [1, 2, 3]})
        assert [of is None for of in answer["similarity"]] == [False, True, False]
        assert answer["encoded"] == 2
        with pytest.raises(Forgotten, match="picture 2 is gone"):
            found.search({"row": 2})
        found.close()


def test_captions_that_cannot_be_read_hide_no_picture(
    model: m3i_fast.Model, dataset: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    with open_pictures(copy, None, tmp_path) as opened:
        found = Answers(model, opened, cached_features(model, opened, tmp_path), model_name="m")
        tar = max(copy.rglob("*.tar"), key=lambda file: file.stat().st_size)
        with tar.open("r+b") as file:
            file.truncate(tar.stat().st_size // 2)
        names = [each["name"] for each in found.search({"words": "a dog", "num": 96})["results"]]
        told = [name for name in names if "cannot be read: " in name]
        assert 0 < len(told) < len(names)
        found.close()


# ---- Patches -------------------------------------------------------------------------------------


def test_patches_are_compared_about_the_means_of_their_places(
    answers: Answers, model: m3i_fast.Model, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_module, "PATCH_BATCH", 3)
    cells = model.forward_features(views_of(model, pictures))[:, model.num_prefix_tokens :]
    about_mean = unit(cells - position_means([cells]).float())
    query = answers.add_picture(pictures.read(2))["query"]["id"]
    rows = [9, 0, 2, 30, 9, 11]
    for cell in (0, 7, about_mean.shape[1] - 1):
        answer = answers.patches({"query": query, "cell": cell, "rows": rows})
        expected = about_mean[rows] @ about_mean[2, cell]
        np.testing.assert_allclose(answer["similarity"], expected, rtol=0, atol=6e-4)
        assert answer["similarity"][2][cell] == 1  # the patch itself, in its own picture
        assert answer["encoded"] <= 5
    assert answers.patches({"query": query, "cell": 1, "rows": rows})["encoded"] == 0


def test_tokens_that_are_kept_are_those_used_last(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_tokens", answers_module.Kept(4))
    query = answers.search({"row": 0})["query"]["id"]

    def encoded(*rows: int) -> int:
        return int(answers.patches({"query": query, "cell": 0, "rows": list(rows)})["encoded"])

    assert [encoded(1, 2), encoded(3, 4), encoded(1), encoded(5, 6)] == [2, 2, 0, 2]
    assert [encoded(1), encoded(2)] == [0, 1]
    assert encoded(5, 7, 8, 9) == 3  # 5, the oldest but one, is not dropped for those it is with


def test_old_queries_are_forgotten(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_queries", answers_module.Kept(2))
    ids = [answers.search({"row": row})["query"]["id"] for row in (0, 1)]
    answers.search({"query": ids[0]})
    answers.search({"row": 2})
    assert answers.search({"query": ids[0]})["results"]
    with pytest.raises(Forgotten, match="too long ago: give it again"):
        answers.search({"query": ids[1]})


# ---- What cannot be answered ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "expected one of words, query and row, got none"),
        ({"words": "a", "row": 1}, r"got \['words', 'row'\]"),
        ({"words": 3}, "words: expected a string, got 3"),
        ({"words": " \n"}, "type some words"),
        ({"words": "x" * 1001}, "expected at most 1000 letters, got 1001"),
        ({"row": True}, "row: expected an integer, got True"),
        ({"row": 0, "num": 0}, "num: expected 1 to 96, got 0"),
        ({"row": 0, "num": 97}, "num: expected 1 to 96, got 97"),
        ({"row": 0, "class": -1}, "class: expected 0 to 8, got -1"),
        ({"row": 0, "class": "cat"}, "class: expected an integer or null, got 'cat'"),
    ],
)
def test_a_wrong_search_is_told(answers: Answers, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answers.search(request_)


def test_wrong_patches_are_told(answers: Answers) -> None:
    query = answers.search({"row": 0})["query"]["id"]
    cells = answers.about()["grid"] ** 2
    for request, message in (
        ({"cell": 0, "rows": [1]}, "query: expected a string, got nothing"),
        ({"query": query, "cell": cells, "rows": [1]}, f"cell: expected 0 to {cells - 1}"),
        ({"query": query, "cell": -1, "rows": [1]}, "got -1"),
        ({"query": query, "cell": 0, "rows": []}, "rows: expected 1 to 96 of them, got 0"),
        ({"query": query, "cell": 0, "rows": [0] * 97}, "got 97"),
        ({"query": query, "cell": 0, "rows": ["0"]}, r"rows\[0\]: expected an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            answers.patches(request)
    with pytest.raises(Forgotten):
        answers.patches({"query": query, "cell": 0, "rows": [10**6]})
    with pytest.raises(Forgotten):
        answers.patches({"query": "none", "cell": 0, "rows": [1]})


def test_a_model_without_captions_has_no_words(
    run: Path, pictures: Pictures, tmp_path: Path
) -> None:
    alone = m3i_fast.load(run, which="ema", device="cpu")
    found = Answers(alone, pictures, cached_features(alone, pictures, tmp_path), model_name="m")
    assert not found.about()["words"] and not found.about()["guesses"]
    with pytest.raises(ValueError, match="trained without captions: search by a picture"):
        found.search({"words": "a cat"})
    answer = found.search({"row": 0})
    assert answer["query"]["guesses"] == [] and answer["results"][0]["guess"] is None
    found.close()


def test_text_steers_nothing(answers: Answers) -> None:
    assert answers.search({"words": "a \ud800\u202e cat"})["results"]


# ---- Thumbnails ----------------------------------------------------------------------------------


def test_a_thumbnail_is_the_centred_square(
    model: m3i_fast.Model, folder: Path, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    large.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((1600, 960)).save(large / "a.jpg", quality=95)
    Image.fromarray(noise).save(large / "b.png")
    with open_pictures(large, None, tmp_path) as opened:
        found = Answers(model, opened, cached_features(model, opened, tmp_path), model_name="m")
        small, tiny = found.thumbnail(0), found.thumbnail(1)
        whole = Image.open(io.BytesIO(found.picture(0).content))
        found.close()
    assert (small.kind, tiny.kind) == ("image/jpeg", "image/png")
    shown = Image.open(io.BytesIO(small.content))
    square = Image.open(large / "a.jpg").crop((320, 0, 1280, 960)).resize((288, 288))
    assert shown.size == (288, 288) and whole.size == (1600, 960)
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(square)).mean() < 3
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(tiny.content))), noise[:, 4:16])
