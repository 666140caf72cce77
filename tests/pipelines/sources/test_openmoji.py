"""OpenMoji: concepts never cross splits, annotation follows the concept, bytes repeat."""

from __future__ import annotations

import io
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.manifest import Manifest
from m3i_fast.pipelines.dataset.sample_table import split_digest
from m3i_fast.pipelines.dataset.verification.verify import verify
from m3i_fast.pipelines.sources import openmoji
from m3i_fast.pipelines.sources.openmoji import Drawing

LIMIT = 60


def build(out: Path, **options: object) -> Path:
    fields = {"limit": LIMIT, "image_size": 24, "num_merges": 200, "samples_per_shard": 64}
    return openmoji.build(out, **{**fields, **options})  # type: ignore[arg-type]


def rows(path: Path, split: str) -> dict[int, dict[str, bytes]]:
    """sample_id: components, in order of sample_id."""
    tars = sorted(str(tar) for tar in path.glob(f"{split}-*.tar"))
    found = {
        int(np.frombuffer(row["sid"], "<i8")[0]): row
        for row in webdataset.WebDataset(tars, shardshuffle=False)
    }
    return dict(sorted(found.items()))


def integer(raw: bytes) -> int:
    return int(np.frombuffer(raw, "<i8")[0])


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    return openmoji.read_drawings()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("whole") / "data")


@pytest.fixture(scope="module")
def tenth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tenth") / "data", labelled=0.1, tune=0.25)


def test_the_drawings(drawings: list[Drawing]) -> None:
    assert [d.sample_id for d in drawings] == list(range(len(drawings)))
    assert len(drawings) > 3800
    assert len({d.category for d in drawings}) == 9
    share = Counter(d.category for d in drawings)["People & Body"] / len(drawings)
    assert 0.55 < share < 0.70
    assert len({d.group_id for d in drawings}) > 1600


def test_flags_of_countries_are_called_flags(drawings: list[Drawing]) -> None:
    captions = {d.caption for d in drawings if d.category == "Flags"}
    assert all("flag" in caption.lower() for caption in captions)
    assert {"flag: Kenya", "flag: Wales", "rainbow flag", "black flag"} <= captions


def test_variants_of_one_drawing_are_one_concept(drawings: list[Drawing]) -> None:
    concept = {d.caption: d.group_id for d in drawings}
    for same in (
        ("running", ["man running", "woman running", "person running medium skin tone"]),
        ("running back", ["man running", "woman running facing right dark skin tone"]),
        ("doctor", ["health worker", "man health worker", "woman health worker light skin tone"]),
        ("hands", ["women holding hands", "woman and man holding hands", "people holding hands"]),
        ("claus", ["Santa Claus", "Mrs. Claus dark skin tone", "Mx Claus"]),
        ("mer", ["mermaid", "merman", "merperson light skin tone"]),
        ("old", ["old man", "old woman", "older person"]),
        ("prince", ["prince", "princess", "person with crown"]),
        ("family", ["family", "family man woman girl boy"]),
        ("wave", ["waving hand", "waving hand medium-dark skin tone"]),
        ("person", ["man", "woman", "person"]),
        ("child", ["boy", "girl", "child"]),
    ):
        assert len({concept[c] for c in same[1]}) == 1, same
    apart = ["grinning face", "red apple", "green apple", "thumbs up", "thumbs down", "person"]
    assert len({concept[c] for c in [*apart, "female sign", "male sign", "baby"]}) == 9


def test_no_caption_without_its_variant_words_is_in_two_concepts(drawings: list[Drawing]) -> None:
    """An independent look for leaks: the same drawing under another tone has the same base code."""
    groups: dict[str, set[int]] = defaultdict(set)
    for drawing in drawings:
        tones = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
        groups["-".join(s for s in drawing.code.split("-") if s not in tones)].add(drawing.group_id)
    assert all(len(found) == 1 for found in groups.values())


def test_group_id_is_its_first_and_plainest_drawing(drawings: list[Drawing]) -> None:
    first = {d.sample_id: d for d in drawings}
    for drawing in drawings:
        leader = first[drawing.group_id]
        assert leader.group_id == leader.sample_id <= drawing.sample_id
        assert "skin tone" not in leader.caption


def test_concepts_are_held_out_whole(whole: Path, tenth: Path) -> None:
    for path, splits in ((whole, ("train", "heldout")), (tenth, ("train", "tune", "heldout"))):
        groups = [{integer(r["gid"]) for r in rows(path, s).values()} for s in splits]
        assert sum(len(g) for g in groups) == len(set.union(*groups)) == LIMIT
        assert len(groups[-1]) == round(0.2 * LIMIT)
        if len(groups) == 3:
            assert len(groups[1]) == round(0.25 * 0.8 * LIMIT)
    assert not list(whole.glob("tune-*"))
    assert rows(whole, "heldout").keys() == rows(tenth, "heldout").keys()


def test_splits_and_ids_do_not_depend_on_the_labelled_share(whole: Path, tmp_path: Path) -> None:
    half = build(tmp_path / "half", labelled=0.5)
    for split in ("train", "heldout"):
        ours, theirs = rows(whole, split), rows(half, split)
        assert ours.keys() == theirs.keys()
        for sample_id, row in ours.items():
            assert row["png"] == theirs[sample_id]["png"]
            assert row["gid"] == theirs[sample_id]["gid"]
    heldout = rows(half, "heldout").values()
    assert split_digest(half, "heldout") == split_digest(whole, "heldout")
    assert all("tok" in row and integer(row["cls"]) >= 0 for row in heldout)


def kinds(path: Path) -> dict[int, str]:
    """concept: what its training drawings keep; one answer a concept."""
    found: dict[int, set[str]] = defaultdict(set)
    for row in rows(path, "train").values():
        kept = ("caption " if "tok" in row else "") + ("class" if integer(row["cls"]) >= 0 else "")
        found[integer(row["gid"])].add(kept.strip())
    assert all(len(kept) == 1 for kept in found.values())
    return {group: kept.pop() for group, kept in found.items()}


def test_the_labelled_share_is_exact_and_the_rest_falls_in_thirds(tenth: Path) -> None:
    counts = Counter(kinds(tenth).values())
    num_train = round(0.8 * LIMIT) - round(0.25 * 0.8 * LIMIT)
    assert counts["caption class"] == round(0.1 * num_train)
    assert sum(counts.values()) == num_train
    thirds = [counts["caption"], counts["class"], counts[""]]
    assert max(thirds) - min(thirds) <= 1


def test_captions_classes_and_pictures(whole: Path, drawings: list[Drawing]) -> None:
    manifest: Manifest = verify(whole)
    tokenizer = Tokenizer.from_info(manifest.tokenizer)
    for split in ("train", "heldout"):
        for sample_id, row in rows(whole, split).items():
            drawing = drawings[sample_id]
            ids = np.frombuffer(row["tok"], "<i4")
            assert np.array_equal(ids, tokenizer.encode(drawing.caption))
            assert manifest.class_names[integer(row["cls"])] == drawing.category
            picture = Image.open(io.BytesIO(row["png"]))
            assert picture.mode == "RGB" and picture.size == (24, 24)
            assert np.asarray(picture).std() > 2  # something is drawn
    assert manifest.splits["train"].num_labels == manifest.splits["train"].num_samples


def test_licence_and_attribution_travel_with_the_pictures(whole: Path) -> None:
    manifest = verify(whole)
    assert manifest.licence == "CC BY-SA 4.0"
    assert "OpenMoji" in manifest.attribution and "CC BY-SA 4.0" in manifest.attribution
    assert "Creative Commons" in (whole / "LICENSE.txt").read_text()
    assert (whole / "ATTRIBUTION.txt").read_text().strip() == manifest.attribution


def test_same_bytes_on_every_run(whole: Path, tmp_path: Path) -> None:
    again = build(tmp_path / "again")
    names = sorted(f.name for f in whole.iterdir())
    assert names == sorted(f.name for f in again.iterdir())
    assert all((whole / n).read_bytes() == (again / n).read_bytes() for n in names)
    other = build(tmp_path / "other", seed=1)
    assert (whole / "manifest.json").read_bytes() != (other / "manifest.json").read_bytes()
    digests = [split_digest(p, s) for p in (whole, other) for s in ("train", "heldout")]
    assert len(set(digests)) == 4 and all(re.fullmatch("[0-9a-f]{8}", d) for d in digests)


def test_data_of_before_there_were_clusters_is_refused(whole: Path, tmp_path: Path) -> None:
    openmoji.expect_split_clusters(whole)
    raw = json.loads((whole / "manifest.json").read_text())
    assert raw["settings"].pop("one_split_nearer_than") == 0.05
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"{tmp_path}: expected near-duplicates in one split"):
        openmoji.expect_split_clusters(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(raw | {"name": "pets"}))
    openmoji.expect_split_clusters(tmp_path)  # of somebody else's data nothing is known


def test_baseline_jpeg(tmp_path: Path) -> None:
    path = build(tmp_path / "jpg", limit=5, image_format="jpg")
    for row in rows(path, "train").values():
        picture = Image.open(io.BytesIO(row["jpg"]))
        assert picture.format == "JPEG" and "progressive" not in picture.info


@pytest.mark.parametrize("name", ["labelled", "captioned", "heldout", "tune"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_fractions_out_of_range_are_refused(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a fraction .* got {value}"):
        build(tmp_path / "x", **{name: value})


def test_other_names_are_words_of_this_concept_alone(drawings: list[Drawing]) -> None:
    def letters(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    users: dict[str, set[int]] = defaultdict(set)
    for d in drawings:
        texts = [letters(text) for text in (d.caption, *d.other_captions)]
        assert len(set(texts)) == len(texts)
        assert not any(c.isdigit() or c in "_:" for text in d.other_captions for c in text)
        for text in texts:
            users[text].add(d.group_id)
    others = {letters(text) for d in drawings for text in d.other_captions}
    assert len(others) > 1000
    assert all(len(users[text]) == 1 for text in others)
    of = {d.caption: d.other_captions for d in drawings}
    assert of["pot of food"] == ("stew",)
    assert of["person running"] == ("runner", "running")
    assert of["flag: Kenya"] == ("flag for Kenya", "kenya flag")
    assert of["thumbs up"] == ("thumbs up sign",)  # "thumbsup" is the name again, "+1" no words


def test_captions_per_picture(whole: Path, tmp_path: Path, drawings: list[Drawing]) -> None:
    path = build(tmp_path / "data", captions_per_picture=2)
    manifest = verify(path)
    assert manifest.settings["captions_per_picture"] == 2
    tokenizer = Tokenizer.from_info(manifest.tokenizer)
    one_caption = rows(whole, "train")
    totals = Counter[int]()
    for sample_id, row in rows(path, "train").items():
        drawing = drawings[sample_id]
        ids = [tokenizer.encode(t) for t in (drawing.caption, *drawing.other_captions[:1])]
        assert row["tok"] == b"".join(i.astype("<i4").tobytes() for i in ids)
        if len(ids) == 1:
            assert "len" not in row and row["tok"] == one_caption[sample_id]["tok"]
        else:
            assert np.frombuffer(row["len"], "<i4").tolist() == [len(i) for i in ids]
        totals[len(ids)] += 1
    split = manifest.splits["train"]
    assert min(totals[1], totals[2]) > 5
    assert (split.max_captions, split.total_captions) == (2, totals[1] + 2 * totals[2])
    assert split.num_captions == split.num_samples


def test_what_is_not_asked_for_leaves_no_trace(whole: Path) -> None:
    raw = json.loads((whole / "manifest.json").read_text())
    assert not {"captioned", "captions_per_picture"} & raw["settings"].keys()


@pytest.mark.parametrize("value", [0, -1])
def test_captions_per_picture_out_of_range_is_refused(tmp_path: Path, value: int) -> None:
    with pytest.raises(ValueError, match=f"captions_per_picture: expected at least 1, got {value}"):
        build(tmp_path / "x", captions_per_picture=value)
