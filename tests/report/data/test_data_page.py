"""A data set's page: what it shows is what is there, whatever captions and names hold."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m3i_fast.cli import main
from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.pipelines.dataset.annotations.columns import ColumnInfo
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.dataset.samples import Sample
from m3i_fast.pipelines.opened.open_few import open_few
from m3i_fast.recipes import recipes
from m3i_fast.report.data.gather import gather, pictures_of
from m3i_fast.report.data.inputs import DataPageInputs
from m3i_fast.report.data.page import number_bars, printable, render_data_page
from tests.shared.chromium import check_page, skip_reason
from tests.shared.pipelines.data import encode_image, info, sample, smooth_picture

PLAIN = ViewConfig(size=32, jitter_probability=0.0, gray_probability=0.0)
HOSTILE = "<script>alert(1)</script> & <b>x</b> \"'"
CLASSES = ("cat", '"><img src=x onerror=alert(2)>', "a \u202e dog")


def picture(i: int, height: int = 40, width: int = 60) -> bytes:
    return encode_image(smooth_picture(i, height, width))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(num_merges=500, context_length=48)


@pytest.fixture(scope="module")
def hostile(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven training pictures, two of them nearly equal, one of them nearly a held-out one."""
    captions = (HOSTILE, "", "two cats", "", "x" * 300, "rain \u202e falls")
    samples = [
        sample(
            i,
            picture(i, 40 + 20 * (i % 2)),
            captions=(tokenizer.encode(text),) if text else (),
            label=(0, 1, -1)[i % 3],
        )
        for i, text in enumerate(captions)
    ]
    samples.append(sample(6, _lighter(2), captions=(), label=2))
    samples.append(sample(7, _lighter(3), captions=(), label=2, group_id=3))
    heldout = [sample(20, _lighter(4), captions=(), label=0)]
    out = tmp_path_factory.mktemp("data") / "hostile"
    about = info(class_names=CLASSES, tokenizer=tokenizer.info, attribution=HOSTILE)
    splits = {"train": samples, "heldout": heldout}
    write_dataset(out, splits, about, seed=0, samples_per_shard=4)
    refused = [
        {"file": f"{HOSTILE}.gif", "reason": "expected JPEG or PNG data, got GIF"},
        {"file": "\udcff.gif", "reason": "expected JPEG or PNG data, got BMP"},
        {"file": "a.tar", "sample": "7", "reason": "<i>too large</i>", "what_to_do": "shrink <it>"},
    ]
    (out / "refused.jsonl").write_text("".join(json.dumps(row) + "\n" for row in refused))
    return out


def _lighter(i: int) -> bytes:
    pixels = smooth_picture(i, 40 + 20 * (i % 2), 60).astype(int) + 4
    return encode_image(pixels.clip(0, 255).astype(np.uint8))


def read(path: Path, views: ViewConfig = PLAIN, num: int = 8, **changes: object) -> DataPageInputs:
    cfg = LoaderConfig(path=path, global_views=views, num_threads=1)
    counted = int(str(changes.pop("counted", 1000)))
    cfg = replace(cfg, **changes)  # type: ignore[arg-type]
    return gather(cfg, num_shown=num, num_counted=counted, views_of="recipe test")


@pytest.fixture(scope="module")
def found(hostile: Path) -> DataPageInputs:
    return read(hostile, local_views=replace(PLAIN, size=16, count=3, scale=(0.05, 0.3)))


def test_captions_classes_and_file_names_are_text_not_markup(found: DataPageInputs) -> None:
    html = render_data_page(found)
    html.encode()
    own = html.replace("<script>//", "", 1)  # the page's own script follows the colour scheme
    for markup in ("<script>alert", "< script", "<b>x", "<img src=x", "<i>too"):
        assert markup not in own, markup
    assert "&lt;i&gt;too large&lt;/i&gt;" in html and "&lt;img src=x onerror=alert(2)&gt;" in html
    assert not re.search("[\u202e\ud800-\udfff]", html)
    assert "default-src 'none'" in html
    links = re.findall(r'(?:src|href)="([^"]*)"', re.sub(r"&#34;", "", html))
    assert len(links) > 40 and all(link.startswith("data:") for link in links)


def test_what_is_shown_is_what_is_stored(found: DataPageInputs, hostile: Path) -> None:
    assert (found.num_samples, found.num_captions, found.num_labels) == (8, 4, 6)
    assert sorted(s.sample_id for s in found.samples) == list(range(8))
    by_id = {s.sample_id: s for s in found.samples}
    assert by_id[1].caption == "" and by_id[2].caption == "two cats"
    assert "script" in by_id[0].caption and by_id[2].category == "" and by_id[4].category
    assert by_id[7].group_id == 3 and by_id[1].size == (60, 60) and by_id[0].size == (40, 60)
    assert np.array_equal(by_id[1].picture, smooth_picture(1, 60, 60))
    assert sorted(found.counted.labels) == [-1, -1, 0, 0, 1, 1, 2, 2]
    assert sum(n > 0 for n in found.counted.num_tokens) == 4
    html = render_data_page(found)
    assert html.count("no caption") == 4 and html.count("no class") == 2
    assert html.count(">2, 25%<") >= 3  # of each of three classes
    assert "25% fill that" in html  # the caption of 300 letters


def test_a_view_is_its_box_of_the_picture(hostile: Path) -> None:
    """With neither colours nor blur, the region resized by Pillow, mirrored as told."""
    for shown in read(hostile).samples:
        whole = Image.fromarray(shown.picture)
        assert len(shown.views) == 2
        for view in shown.views:
            box = (view.x, view.y, view.x + view.width, view.y + view.height)
            expected = np.asarray(whole.resize((32, 32), Image.Resampling.BICUBIC, box)).astype(int)
            expected = expected[:, ::-1] if view.is_mirrored else expected
            assert np.abs(view.picture - expected).mean() < 1.0


def test_boxes_are_drawn_where_they_are(found: DataPageInputs) -> None:
    html = render_data_page(found)
    svgs = re.findall(r'<svg viewBox="0 0 (\d+) (\d+)".*?</svg>', html, re.DOTALL)
    assert [(int(w), int(h)) for w, h in svgs] == [s.size[::-1] for s in found.samples]
    drawn = re.findall(
        r'<rect class="(g0|g1|local)" x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"/>', html
    )
    expected = [
        ("local" if v.is_local else f"g{i}", v.x, v.y, v.width, v.height)
        for s in found.samples
        for i, v in [*list(enumerate(s.views))[2:], *list(enumerate(s.views))[:2]]
    ]
    assert [(kind, *map(float, box)) for kind, *box in drawn] == expected
    mirrored = sum(v.is_mirrored for s in found.samples for v in s.views)
    assert 0 < mirrored == len(re.findall(r"</span> mirrored", html)) < 40
    assert html.count("&harr;") == 2 * mirrored


def test_near_duplicates_of_other_groups_are_found_and_those_of_two_splits_come_first(
    found: DataPageInputs,
) -> None:
    assert (found.num_near, found.num_near_in_group) == (2, 1)
    assert [(set(p.splits), set(p.sample_ids)) for p in found.near] == [
        ({"train", "heldout"}, {4, 20}),
        ({"train"}, {2, 6}),
    ]
    assert all(0.005 < pair.distance < 0.02 for pair in found.near)  # 4 of 255, less what clipped
    html = render_data_page(found)
    assert html.count("in two splits") == 1 and "2 pairs of different groups" in html


def test_what_was_refused_is_counted_by_reason(found: DataPageInputs, hostile: Path) -> None:
    html = render_data_page(found)
    assert "3 files of the source are not in the data set" in html
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th>(.*?)</tr>', html)
    table = {name: re.findall("<td>(.*?)</td>", cells) for name, cells in rows}
    assert table["expected JPEG or PNG data"] == ["2"]
    assert table["a.tar: 7"] == ["&lt;i&gt;too large&lt;/i&gt;", "shrink &lt;it&gt;"]
    assert "What was left out" not in render_data_page(replace(found, refused=None))
    assert "Nothing: every picture" in render_data_page(replace(found, refused=[]))


@pytest.mark.pages
@pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason()))
def test_the_page_reads_well_in_a_browser(found: DataPageInputs, tmp_path: Path) -> None:
    page = tmp_path / "data.html"
    page.write_text(render_data_page(found))
    check_page(page, tmp_path, num_figures=0)


def test_one_sample_without_annotations(tokenizer: Tokenizer, tmp_path: Path) -> None:
    about = info(class_names=(), tokenizer=tokenizer.info)
    alone = [sample(0, picture(0), captions=(), label=-1)]
    write_dataset(tmp_path / "one", {"train": alone}, about, seed=0, samples_per_shard=4)
    page = read(tmp_path / "one", num=64)
    html = render_data_page(page)
    assert len(page.samples) == 1 and page.near == []
    assert "All pictures of split train" in html and "Length of captions" not in html
    assert "No pictures of different groups are nearly equal" in html


class Many:
    """Ten thousand samples of a few pictures, made as they are asked for."""

    pictures = [picture(i, 24, 24) for i in range(50)]

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int, /) -> Sample:
        if index >= len(self):
            raise IndexError(index)
        return sample(index, self.pictures[index % 50], captions=(), group_id=index % 50)


def test_of_ten_thousand_samples_some_are_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    splits = {"train": Many()}
    about = info(tokenizer=tokenizer.info)
    write_dataset(tmp_path / "many", splits, about, seed=0, samples_per_shard=2500)
    page = read(tmp_path / "many", num=5, counted=300)
    assert (len(page.samples), len(page.counted.labels)) == (5, 300)
    assert page.num_near == 0 and page.num_near_in_group > 100
    html = render_data_page(page)
    assert "5 of the 10,000 pictures" in html and "of 300 of its pictures" in html


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
def test_each_value_is_in_one_bar_of_its_range(values: list[int]) -> None:
    bars = number_bars(values)
    assert len(bars) <= 13
    spans = [[int(n.replace(",", "")) for n in bar.name.split(" to ")] for bar in bars]
    for span, bar in zip(spans, bars, strict=True):
        inside = sum(span[0] <= value <= span[-1] for value in values)
        assert bar.text.startswith(f"{inside:,}, ")
    assert all(a[-1] < b[0] for a, b in zip(spans, spans[1:], strict=False))
    assert any(bar.width == "100.0%" for bar in bars)


@given(st.text())
def test_text_of_a_page_can_be_encoded_and_steers_nothing(text: str) -> None:
    shown = printable(text + "\ud800\u202e\0")
    assert shown.endswith("\ufffd" * 3) and len(shown) == len(text) + 3
    shown.encode()


# ---- The command ---------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_the_command_writes_the_page(
    hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    command = ["data", "show", str(hostile), "--num", "3", "--out", str(out), "--recipe", "demo"]
    assert main(command) == 0
    assert f"wrote {out}: 3 of 8 pictures, 2 near duplicates of other groups" in said(capsys)
    html = out.read_text()
    assert html.count("<article") == 3 + 2 and "recipe demo" in html
    config = tmp_path / "config.json"
    assert main([*command[:-2], "--config", str(config)]) == 2
    assert str(config) in said(capsys)
    demo = recipes()["demo"]()
    upright = replace(demo.data.global_views, flip_probability=0.0)
    replace(demo, data=replace(demo.data, global_views=upright, local_views=None)).save(config)
    assert main([*command[:-2], "--config", str(config)]) == 0
    html = out.read_text()
    assert str(config) in html and html.count('class="tag g0"') == 2 * 3
    assert "tag local" not in html and "&harr;" not in html
    mixed = replace(demo.data, mixture=(f"{tmp_path / 'other'}:train:1",))
    replace(demo, data=mixed).save(config)
    assert main([*command[:-2], "--config", str(config)]) == 0  # of the data set that is named
    assert out.read_text().count("<article") == 3 + 2


def test_a_picture_of_more_pixels_than_pillow_takes_is_shown(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 60 // 4)
    cfg = LoaderConfig(path=hostile)
    shown = pictures_of(open_few(cfg), [1], cfg.max_pixels)
    assert np.array_equal(shown[1], smooth_picture(1, 60, 60))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num", "0"], "--num: expected at least 1, got 0"),
        (["--counted", "0"], "--counted: expected at least 1, got 0"),
        (["--split", "tune"], "split: expected one of ['heldout', 'train'], got 'tune'"),
        (["--recipe", "dem"], "unknown recipe 'dem'"),
    ],
)
def test_what_cannot_be_shown_is_named(
    flags: list[str],
    message: str,
    hostile: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "page.html"
    assert main(["data", "show", str(hostile), "--out", str(out), *flags]) == 2
    assert message in said(capsys) and not out.exists()


@pytest.mark.parametrize("line", ["{", "[1]", '{"file": "a"}', "\udcff"])
def test_a_damaged_list_of_refusals_is_named(
    line: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    about = info(tokenizer=tokenizer.info)
    samples = [sample(0, picture(0), captions=())]
    path = write_dataset(tmp_path / "d", {"train": samples}, about, seed=0, samples_per_shard=4)
    (path / "refused.jsonl").write_text(f"{line}\n", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"refused\.jsonl: line 1: expected an object with file"):
        read(path)


def test_named_columns_have_a_tile_each(
    found: DataPageInputs, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    columns = (
        ColumnInfo(name="genus", kind="class", names=("cat", "dog")),
        ColumnInfo(name="sizes", kind="numbers", names=("a", "b", "c"), size=3),
    )
    values = [{"genus": 1}, {"sizes": [1.0, None, 2.0]}, {"genus": 0}, {}]
    samples = [sample(i, picture(i), columns=each) for i, each in enumerate(values)]
    about = info(columns=columns, tokenizer=tokenizer.info)
    write_dataset(tmp_path / "data", {"train": samples}, about, seed=0, samples_per_shard=4)
    html = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", render_data_page(read(tmp_path / "data"))))
    assert "with genus 50% 2, class of 2 with sizes 25% 1, numbers of 3" in html
    assert not found.columns


COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 200)}


def test_boxes_are_drawn_where_regions_are(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of one colour each, on the picture and on its views; two of them have one text."""
    pixels = np.full((60, 80, 3), 128, np.uint8)
    placed = {"red": (6, 8, 30, 36), "green": (34, 40, 56, 76), "blue": (8, 50, 28, 74)}
    regions = []
    for name, (top, left, bottom, right) in placed.items():
        pixels[top:bottom, left:right] = COLOURS[name]
        box = (top / 60, left / 80, bottom / 60, right / 80)
        ids = tokenizer.encode(f"the {name} <b>one</b>").tolist()
        regions += [(box, ids)] * (1 + (name == "blue"))
    samples = [
        sample(i, encode_image(pixels), captions=(), columns={"objects": of})
        for i, of in enumerate([regions, regions, [], None])
    ]
    about = info(
        tokenizer=tokenizer.info,
        columns=(ColumnInfo(name="objects", kind="regions", size=4),),
    )
    out = write_dataset(tmp_path / "data", {"train": samples}, about, seed=0, samples_per_shard=4)
    views = replace(PLAIN, count=2, size=64, scale=(0.4, 0.8), flip_probability=0.5)
    page = read(out, views, num=4)
    drawn = 0
    for shown in page.samples:
        assert [r.number for r in shown.regions] == ([1, 2, 3, 4] if shown.sample_id < 2 else [])
        of_views = [(view.picture, view.regions) for view in shown.views]
        for image, found in [(shown.picture, shown.regions), *of_views]:
            height, width = image.shape[:2]
            for region in found:
                name = region.text.split()[1]
                assert region.number in {"red": (1,), "green": (2,), "blue": (3, 4)}[name]
                rows = slice(round(region.top * height) + 2, round(region.bottom * height) - 2)
                columns = slice(round(region.left * width) + 2, round(region.right * width) - 2)
                inside = image[rows, columns].astype(int)
                assert inside.size and abs(inside - COLOURS[name]).max() < 12
                drawn += 1
    assert drawn > 12 and any(view.is_mirrored for s in page.samples for view in s.views)
    html = render_data_page(page)
    assert html.count('class="region-texts"') == 2 and "found again in the views" in html
    assert "the red &lt; b &gt; one" in html and "<b>one" not in html
    if skip_reason() is None:
        (tmp_path / "page.html").write_text(html)
        check_page(tmp_path / "page.html", tmp_path, num_figures=0)


def test_named_columns_stand_beside_a_picture(tokenizer: Tokenizer, tmp_path: Path) -> None:
    columns = (
        ColumnInfo(name="genus", kind="class", names=("cat", "<b>dog</b>")),
        ColumnInfo(name="tags", kind="labels", names=("red", "old \u202e", "big"), size=3),
        ColumnInfo(name="sizes", kind="numbers", names=("height", "weight"), size=2),
        ColumnInfo(name="alt", kind="text", size=48),
    )
    values = [
        {"genus": 1, "tags": [2, 0], "sizes": [1.5, -20000.0], "alt": tokenizer.encode("a hat")},
        {"genus": 0, "tags": [], "sizes": [None, 0.25]},
        {"tags": [1]},
    ]
    samples = [sample(i, picture(i), columns=of) for i, of in enumerate(values)]
    about = info(tokenizer=tokenizer.info, columns=columns)
    write_dataset(tmp_path / "data", {"train": samples}, about, seed=0, samples_per_shard=2)
    found = read(tmp_path / "data")
    assert {shown.sample_id: dict(shown.columns) for shown in found.samples} == {
        0: {
            "genus": "<b>dog</b>",
            "tags": "big, red",
            "sizes": "height 1.5, weight -20000",
            "alt": "a hat",
        },
        1: {
            "genus": "cat",
            "tags": "none of them",
            "sizes": "height not known, weight 0.25",
            "alt": "",
        },
        2: {"genus": "", "tags": "old \u202e", "sizes": "", "alt": ""},
    }
    html = render_data_page(found)
    assert "<dd>&lt;b&gt;dog&lt;/b&gt;</dd>" in html and "\u202e" not in html
    assert html.count('<dd class="absent">not known</dd>') == 4
