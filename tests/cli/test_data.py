"""The verb that packs and verifies, as a person types it."""

from pathlib import Path

import numpy as np
import pytest

from m3i_fast.cli import main
from m3i_fast.pipelines.dataset.manifest import Manifest, read_manifest
from m3i_fast.pipelines.loader import evaluation_batches
from m3i_fast.pipelines.sources import openmoji
from m3i_fast.recipes import pack_demo
from tests.shared.pipelines.data import encode_image, pack, repack, sample, smooth_picture
from tests.shared.pipelines.icons import disc, write_icons

SMALL = ["--limit", "60", "--image-size", "24", "--num-merges", "200", "--max-variants", "1"]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed, without line ends and the borders of tables."""
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def counts(manifest: Manifest, split: str) -> tuple[int, int, int]:
    found = manifest.splits[split]
    return found.num_samples, found.num_labels, found.num_captions


def test_shares_and_several_captions_are_packed_shown_and_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    shares = ["--labelled", "0.1", "--captioned", "0.5", "--captions-per-picture", "3"]
    assert main(["data", "openmoji", str(out), *SMALL, *shares]) == 0
    said(capsys)
    assert main(["data", "verify", str(out)]) == 0
    text = said(capsys)
    manifest = read_manifest(out)
    for name, split in manifest.splits.items():
        batches = list(evaluation_batches(out, name, image_size=4, batch_size=64))
        num_tokens = np.concatenate([batch.num_tokens for batch in batches])
        label = np.concatenate([batch.label for batch in batches])
        expected = (
            f"{name}: {len(label)} pictures in {split.num_groups} groups, "
            f"{(num_tokens > 0).sum()} with a caption ({split.total_captions} captions, at most "
            f"{split.max_captions} a picture), {(label >= 0).sum()} with a label"
        )
        assert expected in text
    pictures, labels, captions = counts(manifest, "train")
    assert 0 < labels < captions < pictures
    assert manifest.splits["train"].total_captions > captions
    heldout = counts(manifest, "heldout")
    assert len(set(heldout)) == 1


def test_styles_are_packed_counted_and_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    icons = write_icons(tmp_path, {"dog-face": disc("red"), "no-such-thing": disc("red")})
    more = ["--iconify", str(icons), "--heldout-style", "openmoji"]
    assert main(["data", "styles", str(out), *SMALL, *more]) == 0
    text = said(capsys)
    assert "shapes: 2 drawings, 1 of a known concept, 1 left out" in text
    assert f"wrote {out}" in text
    assert main(["data", "verify", "--decode", str(out)]) == 0
    assert "heldout: 12 pictures in 12 groups, 12 with a caption" in said(capsys)
    (tar,) = out.glob("heldout-*.tar")
    tar.unlink()
    assert main(["data", "verify", str(out)]) == 2
    assert f"m3i-fast data styles {out}" in said(capsys)


def test_a_damaged_data_set_ends_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    assert main(["data", "openmoji", str(out), *SMALL]) == 0
    (tar,) = out.glob("heldout-*.tar")
    raw = bytearray(tar.read_bytes())
    raw[700] ^= 1  # in the first picture
    tar.write_bytes(raw)
    said(capsys)
    assert main(["data", "verify", str(out)]) == 2
    text = said(capsys)
    assert f"{tar.name} expected sha256" in text and "damaged: expected CRC-32C" in text


def test_pictures_are_decoded_and_limited_where_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jpeg = encode_image(smooth_picture(0, 99, 99), "JPEG")
    out = pack(tmp_path / "data", [sample(0, jpeg), sample(1, jpeg)])
    verify = ["data", "verify", str(out)]
    assert main([*verify, "--decode"]) == 0
    said(capsys)
    assert main([*verify, "--max-pixels", "9800"]) == 2
    assert "picture-0.jpg (expected at most 9800 pixels, got 99 x 99 = 9801" in said(capsys)
    repack(out, lambda i, found: found | {"jpg": jpeg[: -100 * i] if i else jpeg})
    assert main(verify) == 0
    said(capsys)
    assert main([*verify, "--decode"]) == 2
    assert "picture-1.jpg (corrupt or empty image: image file is truncated" in said(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--captioned", "1.5"], "captioned: expected a fraction from 0 to 1, got 1.5"),
        (["--labelled", "-0.1"], "labelled: expected a fraction from 0 to 1, got -0.1"),
        (["--image-size", "30000"], "image_size: expected at most 9459, got 30000"),
        (["--captions-per-picture", "0"], "captions_per_picture: expected at least 1, got 0"),
    ],
)
def test_requests_out_of_range_are_refused_by_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "data"
    assert main(["data", "openmoji", str(out), *SMALL, *arguments]) == 2
    assert message in said(capsys)
    assert not out.exists()


def test_the_demo_takes_both_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a small size; without `captioned` as ever: both in a share, thirds of the rest."""
    build = openmoji.build

    def small(out: Path, **options: object) -> Path:
        return build(out, limit=60, image_size=24, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("m3i_fast.pipelines.sources.openmoji.build", small)
    pack_demo(tmp_path / "apart", labelled=0.0, captioned=1.0)
    pictures, labels, captions = counts(read_manifest(tmp_path / "apart"), "train")
    assert (labels, captions) == (0, pictures)
    pack_demo(tmp_path / "together", labelled=0.0)
    manifest = read_manifest(tmp_path / "together")
    pictures, labels, captions = counts(manifest, "train")
    assert 0 < labels < pictures and 0 < captions < pictures
    assert "captioned" not in manifest.settings


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-pixels", "-5"], "--max-pixels: expected at least 1, got -5"),
        (["--max-faults", "-1"], "--max-faults: expected at least 0, got -1"),
    ],
)
def test_numbers_that_verify_cannot_use_are_refused(
    tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "verify", str(tmp_path), *flags]) == 2
    assert message in said(capsys)
