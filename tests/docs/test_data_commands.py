"""Commands of the pages on data and weights, typed as they stand there, on what they tell of."""

from __future__ import annotations

import io
import json
import re
import shlex
import tarfile
import urllib.request
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from safetensors.torch import load_file

from m3i_fast.cli import data as data_verbs
from m3i_fast.cli import main
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.engine.checkpoint.checkpoints import latest
from m3i_fast.export.vit_weights import vit_weights
from m3i_fast.pipelines.dataset.manifest import SplitInfo, read_manifest
from m3i_fast.recipes.from_weights import dinov3_s
from m3i_fast.recipes.m3i_vit import m3i_vit_s_h100
from m3i_fast.recipes.production import production
from tests.shared.dino_files import dinov3_file

START = Path(__file__).parent.parent.parent / "docs" / "start"
OWN, AT_SCALE = START / "data.md", START / "data_at_scale.md"
PACK = START / "pack.md"
FROM_WEIGHTS = START.parent / "train" / "start_from_weights.md"
# What makes a run of a recipe short: the networks and pictures, not the data that it reads.
SMALL = (
    "--num-steps=1 --data.batch-size=2 --device=cpu --vision.image-size=32 --vision.depth=1 "
    "--data.global-views.size=32 --text.depth=1"
).split()


def commands(page: Path) -> dict[str, list[list[str]]]:
    """The words of each command in the page's blocks of shell, by heading."""
    found: defaultdict[str, list[list[str]]] = defaultdict(list)
    for section in page.read_text().split("\n## ")[1:]:
        for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found[section.partition("\n")[0]] += [shlex.split(line) for line in lines]
    return found


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((64, 48), Image.Resampling.BICUBIC)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the folder, the table and the tars that the page speaks of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # of the cache, which others may be using
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(10):
            picture(i + 10 * (name == "dog")).save(tmp_path / "pictures" / name / f"{i}.jpg")
    for i, name in enumerate(("street", "unknown")):
        picture(30 + i).save(tmp_path / "pictures" / f"{name}.jpg")
    (table,) = re.findall(r"```text\n(file,.*?)```", OWN.read_text(), re.DOTALL)
    (tmp_path / "pictures.csv").write_text(table)
    (tmp_path / "laion").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "laion" / f"{shard:05d}.tar", "w") as tar:
            for i in range(4):
                _add(tar, f"{shard}{i:04d}", f"picture {i} of tar {shard}", picture(40 + i))
    return tmp_path


def _add(tar: tarfile.TarFile, key: str, caption: str, image: Image.Image) -> None:
    """Add a sample as img2dataset writes them."""
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=90)
    about = json.dumps({"caption": caption, "key": key, "status": "success"})
    for extension, content in (
        ("jpg", encoded.getvalue()),
        ("json", about.encode()),
        ("txt", caption.encode()),
    ):
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def typed(words: list[str]) -> int:
    program, *arguments = words
    assert program == "m3i-fast"
    return main([*arguments, *SMALL] if arguments[0] == "train" else arguments)


def split_of(path: str, name: str = "train") -> SplitInfo:
    return read_manifest(Path(path)).splits[name]


def counts(split: SplitInfo) -> tuple[int, int, int]:
    return split.num_samples, split.num_captions, split.num_labels


def test_each_section_has_its_commands() -> None:
    found = {heading: len(lines) for heading, lines in commands(OWN).items()}
    assert found == {
        "From a folder": 3,
        "From a CSV": 3,
        "From tars of img2dataset": 3,
        "From a bucket": 3,  # which packs to where it trains from
    }


def test_from_a_folder(place: Path) -> None:
    # Two pictures beside the folders of classes make it a folder without labels: put them away.
    for name in ("street", "unknown"):
        (place / "pictures" / f"{name}.jpg").unlink()
    for words in commands(OWN)["From a folder"]:
        assert typed(words) == 0, words
    assert counts(split_of("data/pictures")) == (18, 0, 18)
    assert counts(split_of("data/pictures", "heldout")) == (2, 0, 2)
    assert read_manifest(Path("data/pictures")).class_names == ("cat", "dog")
    assert Path("pictures.html").read_text().count("<article") >= 18
    assert (place / "runs/pictures/checkpoints/latest").exists()


def test_regions_with_a_text(place: Path) -> None:
    """Of the file that the page shows: packed, drawn, and trained on."""
    heading = "Regions with a text"
    section = PACK.read_text().partition(f"## {heading}\n")[2]
    (lines,) = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    (place / "pictures" / "regions.jsonl").write_text(lines)
    for words in commands(PACK)[heading]:
        assert typed(words) == 0, words
    known = split_of("data/regions").columns
    assert known is not None and known.num_known == {"regions": 3}
    page = Path("regions.html").read_text()
    assert page.count('class="region-texts"') == 2 and "a sleeping cat" in page
    rows = (place / "runs/regions/metrics.jsonl").read_text().splitlines()
    logged = {key for row in rows for key in json.loads(row)}
    assert {"loss/grounded_caption", "loss/referring_box"} <= logged
    assert (place / "runs/regions/checkpoints/latest").exists()


def test_from_a_csv(place: Path) -> None:
    for words in commands(OWN)["From a CSV"]:
        assert typed(words) == 0, words
    assert counts(split_of("data/captioned")) == (4, 2, 2)
    assert (place / "runs/captioned/checkpoints/latest").exists()


def test_from_tars(place: Path) -> None:
    tars = {file.name: file.read_bytes() for file in (place / "laion").iterdir()}
    for words in commands(OWN)["From tars of img2dataset"]:
        assert typed(words) == 0, words
    assert counts(split_of("laion")) == (8, 8, 0)
    assert {name: (place / "laion" / name).read_bytes() for name in tars} == tars
    assert (place / "runs/laion/checkpoints/latest").exists()


def test_from_a_bucket(place: Path) -> None:
    pytest.importorskip("obstore")
    from tests.shared.pipelines.s3_server import S3Server, s3_environment

    for name in ("street", "unknown"):  # as above: the folders are the classes
        (place / "pictures" / f"{name}.jpg").unlink()
    server = S3Server()
    try:
        with s3_environment(server.address):
            made = urllib.request.Request(f"{server.address}/bucket", method="PUT")
            urllib.request.urlopen(made).close()
            for words in commands(OWN)["From a bucket"]:
                assert typed(words) == 0, words
    finally:
        server.close()
    assert (place / "runs/bucket/checkpoints/latest").exists()


def test_dinov3_with_labels_and_captions(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command of the section, on twenty pictures and weights of random values."""
    rows = [f"{n}/{i}.jpg,{n} number {i},{n}" for n in ("cat", "dog") for i in range(10)]
    (place / "pictures.csv").write_text("\n".join(["file,caption,class", *rows]))
    cfg = dinov3_s()
    assert isinstance(cfg.vision, ViTConfig)
    vision = replace(cfg.vision, depth=1, image_size=32)
    torch.manual_seed(1)
    state = dinov3_file(vision)
    torch.save(state, "dinov3_vits16_pretrain.pth")
    lines = commands(FROM_WEIGHTS)["DINOv3 on your pictures, with labels and captions"]
    assert [words[1] for words in lines] == ["data", "train", "train", "evaluate", "export"]
    for words in lines:
        assert typed(words) == 0, words
    assert counts(split_of("data/captioned")) == (18, 18, 18)
    results = json.loads(Path("runs/tuned/evaluation/results.json").read_text())
    measured = {encoder["name"]: set(encoder["measures"]) for encoder in results["encoders"]}
    every = {"knn", "few-labels", "zero-shot", "retrieval"}
    assert measured == {"runs/tuned": every, "runs/heads": every}
    begun = vit_weights(state, "dinov3", vision).tensors
    heads, tuned = (
        latest(place / "runs" / run / "checkpoints").shards("model").read("encoder.")
        for run in ("heads", "tuned")
    )
    assert heads.keys() == tuned.keys() == {f"encoder.{name}" for name in begun}
    assert all(torch.equal(heads[f"encoder.{name}"], value) for name, value in begun.items())
    assert not torch.equal(tuned["encoder.norm.weight"], begun["norm.weight"])
    exported = load_file("out/tuned/model.safetensors")  # which tests/export has AutoModel load
    assert all(torch.equal(exported[name], value) for name, value in tuned.items())
    thawed = [word for word in lines[1] if word != "--optim.freeze-encoder"]
    assert typed([*thawed, "--resume"]) == 2
    assert "optim.freeze_encoder: True != False" in " ".join(capsys.readouterr().err.split())


def test_what_the_recipes_from_weights_have() -> None:
    text, cfg = " ".join(FROM_WEIGHTS.read_text().split()), dinov3_s()
    assert cfg.optim.lr == 1.25e-5 and cfg.optim.layer_decay == 0.9
    warm_up = f"the first {cfg.optim.warmup_steps(cfg.num_steps):,} of {cfg.num_steps:,} steps"
    assert f"rises to 1.25e-5 over {warm_up}, and each layer has 0.9" in text
    at_full_rate = production(cfg.vision, batch_size=cfg.data.batch_size, num_steps=cfg.num_steps)
    assert at_full_rate.optim.lr == 1.25e-4 and "--optim.lr 1.25e-4" in text


def test_commands_at_scale_are_read(place: Path) -> None:
    found = commands(AT_SCALE)
    assert len(found) == 2
    for words in (words for lines in found.values() for words in lines):
        if words[:2] == ["m3i-fast", "data"]:
            tyro.cli(data_verbs.Command, args=words[2:])  # type: ignore[call-overload]
        else:
            assert (START.parent.parent / words[0]).is_file()


def test_the_arithmetic_of_the_tables() -> None:
    """Figures that follow from others on the page."""
    text = AT_SCALE.read_text()
    pictures, shard, many = 1_281_167, 4096, 10**9
    for said, value in {
        "| 313 | 313 |": -(-pictures // shard) == 313,
        "| 141 GB | 35 GB |": (round(pictures * 110e3 / 1e9), round(pictures * 27e3 / 1e9)),
        "| 451 MB | 111 MB |": (round(shard * 110e3 / 1e6), round(shard * 27e3 / 1e6)),
        "| 61 MB | 61 MB |": int(pictures * 48 / 1e6) == 61,
        "| 1.4 min | 4.2 min |": [round((pictures + 50_000) * ms / 16 / 6e4, 1) for ms in (1, 3)],
        "| 156 | 156 |": pictures // (8 * m3i_vit_s_h100().data.batch_size) == 156,
        "8 x 1,024 = 4 x 2,048": m3i_vit_s_h100().data.batch_size == 1024,
        "244,160 shards": 20 * -(-many // 20 // shard) == 244_160,
        "45 GB, where": many // 20 * 900 == 45 * 10**9,
        "833 core-hours": round(many * 3e-3 / 3600) == 833,
        "3.8 hours": round(many * 137e3 / 10e9 / 3600, 1) == 3.8,
        "$190": round(1000 * 3.8 * 0.05) == 190,
        "$22": round(13.75 * 0.4 + 3.375 * 5) == 22,
        "= 4.14 ms": round(0.986 * 768 * 1024 / 187_500, 2) == 4.14,
        "6.4 of a card's": round(6521 * 0.986e-3, 1) == 6.4,
        "27 at 768": round(6521 * 0.986e-3 * 768 * 1024 / 187_500) == 27,
        "3.0 packed": round(6521 * 0.986e-3 * 256 * 341 / 187_500, 1) == 3.0,
        "$621 a month": round(27_000 * 0.023) == 621,
    }.items():
        assert said in text, said
        numbers = [float(n) for n in re.findall(r"[\d.]+", said.replace(",", ""))]
        if isinstance(value, bool):
            assert value, said
        else:
            assert list(value) == numbers, said
