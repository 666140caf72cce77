"""Both backends make the same bits, of whatever the shards hold; and which of them is taken."""

from __future__ import annotations

import io
import json
import logging
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m3i_fast.config.data import LoaderConfig
from m3i_fast.doctor import probes
from m3i_fast.pipelines import backends, torch_backend
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.graph import dali_backend
from m3i_fast.pipelines.loader import Loader, evaluation_batches
from m3i_fast.pipelines.storage.shards import LocalShards
from m3i_fast.pipelines.torch_backend import TorchBackend
from tests.shared.pipelines.data import (
    EVERYTHING,
    Components,
    Packer,
    edit_manifest,
    encode_image,
    equal,
    info,
    pack,
    repack,
    sample,
    several_captions,
    smooth_picture,
    take,
)


def stored(index: int) -> bytes:
    """Pictures of as many sizes as there are, in one of ten encodings, some turned by EXIF."""
    picture = Image.fromarray(smooth_picture(index, 40 + 7 * (index % 9), 90 - 5 * (index % 11)))
    kind = index % 10
    buffer = io.BytesIO()
    if kind < 6:
        exif = picture.getexif()
        exif[0x0112] = 1 + index % 8
        mode = {3: "L", 4: "CMYK"}.get(kind, "RGB")
        options = {"progressive": kind == 1, "subsampling": 0 if kind == 2 else 2}
        picture.convert(mode).save(buffer, "JPEG", quality=90, exif=exif, **options)
    else:
        picture.convert(("RGB", "L", "P", "RGBA")[kind - 6]).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures of all kinds, with zero to three captions."""
    samples = [sample(i, stored(i), captions=several_captions(i)) for i in range(40)]
    return pack(tmp_path_factory.mktemp("mixed") / "data", samples)


def both(cfg: LoaderConfig, number: int, **options: object) -> list[tuple[Batch, Batch]]:
    found = [
        take(Loader(replace(cfg, backend=name), **options), number)  # type: ignore[arg-type]
        for name in ("dali", "torch")
    ]
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_one_decoder_changes_nothing_on_a_cpu(mixed: Path, backend: str) -> None:
    """Where pixels depend on the picture alone, in batches of any size; a GPU's decoder gets 0."""
    cfg = LoaderConfig(path=mixed, batch_size=8, global_views=EVERYTHING, backend=backend)
    exact = Loader(replace(cfg, batch_size=4, exact_decode=True))
    assert exact._work.hw_decoder_load == 0.0
    (expected,) = take(Loader(cfg), 1)
    views = torch.cat([batch.global_views[0] for batch in take(exact, 2)])
    assert torch.equal(views, expected.global_views[0])


@pytest.mark.parametrize("interpolation", ["cubic", "linear"])
def test_backends_make_the_same_bits(mixed: Path, interpolation: str) -> None:
    view = replace(EVERYTHING, size=24, interpolation=interpolation)
    cfg = LoaderConfig(
        path=mixed,
        batch_size=8,
        global_views=view,
        local_views=replace(view, size=10, count=3, scale=(0.05, 0.3)),
        seed=3,
        num_threads=2,
    )
    for ours, theirs in both(cfg, 10):
        assert equal(ours, theirs)
        assert all(t.is_contiguous() for b in (ours, theirs) for t in b.tensors())


class Pinned:
    """An output of DALI's, and its tensor, as those in pinned memory, which is none here."""

    def __init__(self, output: Any) -> None:
        self._tensor = output.as_tensor()

    def as_tensor(self) -> Pinned:
        return self

    def __dlpack_device__(self) -> tuple[int, int]:
        return 3, 0  # kDLCUDAHost

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("Unsupported device_type: 3")  # as PyTorch raises

    def __array__(self, *given: Any, **named: Any) -> Any:
        return np.asarray(self._tensor).__array__(*given, **named)


def test_what_dali_pins_is_copied(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a pipeline on a GPU: what the host makes for its operators lies in pinned memory."""
    cfg = LoaderConfig(path=mixed, batch_size=8, global_views=EVERYTHING, backend="dali")
    expected = take(Loader(cfg), 4)
    assert all(batch.boxes.device.type == "cpu" for batch in expected)
    outputs_of = dali_backend.DaliBackend._run
    num_views = sum(view.count for view in (cfg.global_views, cfg.local_views) if view)

    def run(self: dali_backend.DaliBackend) -> list[Any]:
        outputs = outputs_of(self)
        return [*outputs[:num_views], *map(Pinned, outputs[num_views:])]

    monkeypatch.setattr(dali_backend.DaliBackend, "_run", run)
    for ours, theirs in zip(take(Loader(cfg), 4), expected, strict=True):
        assert equal(ours, theirs)


def test_backends_take_the_same_alternates(packer: Packer) -> None:
    flat = [encode_image(np.full((9, 9, 3), level, np.uint8)) for level in range(0, 250, 25)]
    samples = [
        sample(i, flat[i], alternates=tuple(flat[j] for j in range(i % 4 + 1))) for i in range(8)
    ]
    cfg = LoaderConfig(path=packer(samples), batch_size=4, global_views=EVERYTHING)
    for ours, theirs in both(cfg, 8):
        assert equal(ours, theirs)


def test_backends_pass_over_a_split_alike(mixed: Path) -> None:
    passes = [
        list(evaluation_batches(mixed, "train", image_size=20, batch_size=7, backend=name))
        for name in ("dali", "torch")
    ]
    assert [batch.batch_size for batch in passes[0]] == [7] * 5 + [5]
    assert all(equal(a, b) for a, b in zip(*passes, strict=True))


FORMATS = [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]


@pytest.mark.parametrize("tar_format", FORMATS)
def test_members_of_other_packers_are_read(packer: Packer, tar_format: int) -> None:
    """Long names stand in headers of their own, or are split in two."""
    path = packer([sample(i, stored(i)) for i in range(6)])
    cfg = LoaderConfig(path=path, batch_size=6, global_views=EVERYTHING)
    right = next(Loader(cfg))
    folder = "long" * 20
    repack(
        path,
        lambda _, found: found | {"seg.png": b"no picture", "json": b"{}"},
        rename=lambda key: f"{folder}/{key}-{'long' * 15}",
        tar_format=tar_format,
    )
    for ours, theirs in both(cfg, 1):
        assert equal(ours, theirs) and equal(ours, right)


CAPTIONS = ["A red house", "", "Ein H\u00e4uschen, zwei B\u00e4ume", "  one  ", "x " * 99, "a.b"]


@pytest.mark.parametrize("member", ["txt", "json:title"])
def test_captions_of_text_are_tokenised_while_loading(tmp_path: Path, member: str) -> None:
    tokenizer = Tokenizer(num_merges=300, context_length=9)
    made = info(tokenizer=tokenizer.info)
    samples = [sample(i, stored(i), captions=()) for i in range(6)]
    path = write_dataset(tmp_path / "data", {"train": samples}, made, seed=0, samples_per_shard=6)
    extension, _, field = member.partition(":")

    def change(index: int, found: Components) -> Components:
        text = CAPTIONS[index]
        return found | {extension: (json.dumps({field: text}) if field else text).encode()}

    repack(path, change)
    edit_manifest(path, lambda raw: raw.update(caption_member=member))
    cfg = LoaderConfig(path=path, batch_size=3, global_views=EVERYTHING)
    for ours, theirs in both(cfg, 4):
        assert equal(ours, theirs)
        for row, count, index in zip(
            ours.token_ids, ours.num_tokens, ours.sample_id.tolist(), strict=True
        ):
            text = CAPTIONS[index].strip()
            expected = tokenizer.encode(text).tolist() if text else []
            assert row[:count].tolist() == expected and not row[count:].any()


def test_batches_of_text_go_on_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch ahead fails: those before it come, and after the error it does itself."""
    made = info(tokenizer=Tokenizer(num_merges=300, context_length=9).info)
    samples = [sample(i, stored(i), captions=()) for i in range(6)]
    path = write_dataset(tmp_path / "data", {"train": samples}, made, seed=0, samples_per_shard=6)
    repack(path, lambda index, found: found | {"txt": CAPTIONS[index].encode()})
    edit_manifest(path, lambda raw: raw.update(caption_member="txt"))
    cfg = LoaderConfig(path=path, batch_size=3, global_views=EVERYTHING, backend="torch")
    whole, loader = Loader(cfg), Loader(cfg)
    right, calls = LocalShards.locate, 0

    def locate(*arguments: Any) -> list[tuple[str, int]]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise ConnectionError("gave up")
        return right(*arguments)

    expected = [next(whole) for _ in range(8)]
    monkeypatch.setattr(LocalShards, "locate", locate)
    found, failures = [], 0
    while len(found) < 8:
        try:
            found.append(next(loader))
        except ConnectionError:
            failures += 1
            assert loader.samples == 3 * len(found) > 0
    assert failures == 1
    assert all(equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "expected less deeply nested JSON"),
        ('{"title": 0}', "title: expected text, got int"),
        ('{"title": []}', "title: expected text, got list"),
        ('{"title": "\\ud800"}', "surrogates not allowed"),
        ("[]", "expected an object of JSON, got list"),
    ],
)
def test_a_caption_that_is_no_text_is_its_samples_fault(
    tmp_path: Path, text: str, message: str
) -> None:
    """And null is no caption, as of a sample without the field."""
    tokenizer = Tokenizer(num_merges=300, context_length=9)
    samples = [sample(i, stored(i), captions=()) for i in range(4)]
    made = info(tokenizer=tokenizer.info)
    path = write_dataset(tmp_path / "data", {"train": samples}, made, seed=0, samples_per_shard=4)
    members = [text, '{"title": null}', "{}", '{"title": "one"}']
    repack(path, lambda index, found: found | {"json": members[index].encode()})
    edit_manifest(path, lambda raw: raw.update(caption_member="json:title"))
    cfg = LoaderConfig(path=path, batch_size=4, global_views=EVERYTHING, backend="torch")
    with pytest.raises(RuntimeError, match=f"corrupt sample 0 at position .*json: .*{message}"):
        next(Loader(replace(cfg, strict=True)))
    batch = next(Loader(cfg))
    captioned = dict(zip(batch.sample_id.tolist(), (batch.num_tokens > 0).tolist(), strict=True))
    assert captioned == {1: False, 2: False, 3: True}


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """24 pictures with captions of text, of which that of sample 7 is no text."""
    tokenizer = Tokenizer(num_merges=300, context_length=9)
    samples = [sample(i, stored(i), captions=()) for i in range(24)]
    made = info(tokenizer=tokenizer.info)
    path = write_dataset(tmp_path / "data", {"train": samples}, made, seed=0, samples_per_shard=24)
    repack(path, lambda i, f: f | {"txt": b"\xff" if i == 7 else f"picture {i}".encode()})
    edit_manifest(path, lambda raw: raw.update(caption_member="txt"))
    return path


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_captions_are_tokenised_ahead_by_another_thread(
    captioned: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by, encode = [], Tokenizer.encode

    def watched(self: Tokenizer, text: str) -> np.ndarray:
        by.append(threading.current_thread())
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", watched)
    cfg = LoaderConfig(path=captioned, batch_size=4, backend=backend)  # type: ignore[arg-type]
    loader = Loader(replace(cfg, global_views=EVERYTHING))
    for _ in range(8):
        next(loader)
    ahead = loader._backend._ahead[0].result()  # type: ignore[union-attr]
    assert ahead.rows.positions.tolist() == [32, 33, 34, 35] and ahead.num_tokens.all()
    assert threading.main_thread() not in by and len(by) >= 32
    loader.close()


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_a_run_stopped_anywhere_goes_on_with_the_same_captions(
    captioned: Path, backend: str
) -> None:
    """Though a batch is tokenised ahead, in which a sample may turn out to be damaged."""
    cfg = LoaderConfig(path=captioned, batch_size=4, backend=backend)  # type: ignore[arg-type]
    cfg = replace(cfg, global_views=EVERYTHING)
    whole = take(Loader(cfg), 9)
    assert not any((batch.sample_id == 7).any() for batch in whole)
    for stop in range(9):
        first = Loader(cfg)
        begun = take(first, stop)
        state = first.state_dict()
        first.close()
        assert state["samples"] == 4 * stop
        second = Loader(cfg)
        second.load_state_dict(state)
        found = [*begun, *take(second, 9 - stop)]
        assert all(equal(a, b) for a, b in zip(found, whole, strict=True))


def test_groups_of_pictures_make_the_batch(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views are cut of some pictures at once, however many these are."""
    cfg = LoaderConfig(path=mixed, batch_size=8, global_views=EVERYTHING, backend="torch")
    expected = take(Loader(cfg), 3)
    for most in (1, 40_000):
        monkeypatch.setattr(torch_backend, "_MOST_PIXEL_BYTES", most)
        assert all(equal(a, b) for a, b in zip(take(Loader(cfg), 3), expected, strict=True))


# ---- Which one is taken --------------------------------------------------------------------------


def test_a_backend_that_is_missing_says_what_to_do(
    cfg: LoaderConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And auto takes the other one, and says so once."""
    from m3i_fast.pipelines.graph import dali

    expected = next(Loader(replace(cfg, backend="dali")))
    monkeypatch.setattr(dali, "__version__", "1.2.3")
    dali.load_operators.cache_clear()
    backends._told_why_not_dali.cache_clear()
    try:
        message = r"_dali-1.2.3.so: expected this package's operators for DALI 1.2.3, got _dali-2"
        with pytest.raises(ImportError, match=f"{message}.*make install"):
            next(Loader(replace(cfg, backend="dali")))
        with caplog.at_level(logging.WARNING):
            loaders = [Loader(cfg), Loader(cfg)]
            assert all(equal(next(loader), expected) for loader in loaders)
        assert all(isinstance(loader._backend, TorchBackend) for loader in loaders)
        (told,) = [
            r.message for r in caplog.records if "data.backend auto takes torch" in r.message
        ]
        assert "DALI 1.2.3" in told
    finally:
        dali.load_operators.cache_clear()
        backends._told_why_not_dali.cache_clear()


def test_a_library_that_does_not_load_is_as_good_as_none(
    cfg: LoaderConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from m3i_fast.pipelines.graph import dali

    (tmp_path / f"_dali-{dali.__version__}.so").write_bytes(b"no library")
    place = SimpleNamespace(origin=str(tmp_path / "_C.so"))
    monkeypatch.setattr(dali, "find_spec", lambda _: place)
    dali.load_operators.cache_clear()
    backends._told_why_not_dali.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"got a library that does not load.*make install"):
            next(Loader(replace(cfg, backend="dali")))
        assert "does not load" in probes.dali()["missing"]
        with caplog.at_level(logging.INFO):
            loader = Loader(cfg)
            next(loader)
        assert isinstance(loader._backend, TorchBackend)
        assert "auto takes torch, which is slower" in caplog.text
    finally:
        dali.load_operators.cache_clear()
        backends._told_why_not_dali.cache_clear()


def test_the_log_names_the_backend_once(
    cfg: LoaderConfig, caplog: pytest.LogCaptureFixture
) -> None:
    backends._tell.cache_clear()
    with caplog.at_level(logging.INFO):
        for name in ("dali", "torch", "auto"):
            next(Loader(replace(cfg, backend=name)))
    told = [r.message for r in caplog.records if r.message.startswith("data.backend: ")]
    assert told == ["data.backend: DALI on the CPU", "data.backend: torch with Pillow"]
