"""A small plan from packing to the table: rows once, the same bits again, and what failed told."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from m3i_fast.benchmarks.ledger.rows import read_rows
from m3i_fast.benchmarks.one_stage import datasets
from m3i_fast.benchmarks.one_stage import plan as plans
from m3i_fast.benchmarks.one_stage.main import SUBJECT, finished, main
from m3i_fast.benchmarks.one_stage.measures import counts_by_cluster, figure
from m3i_fast.benchmarks.one_stage.plan import BASELINES, read_plan
from m3i_fast.benchmarks.one_stage.train import measure_of
from m3i_fast.pipelines.sources import earth, styles
from m3i_fast.pipelines.sources.concepts import read_drawings
from m3i_fast.pipelines.sources.earth_maps import COVERS, EarthMaps
from tests.benchmarks.one_stage.test_plan import TREE, _commit, _git
from tests.shared.pipelines.icons import slug, write_icons


@pytest.fixture(scope="module")
def maps() -> EarthMaps:
    """An Earth in squares of one land cover each, whose brightness tells it."""
    rng = np.random.default_rng(0)
    squares = rng.integers(len(COVERS), size=(90, 180))
    squares[:, 60:] = 0  # water: a third of the Earth is enough
    cover = np.kron(squares, np.ones((30, 30), int))
    return EarthMaps(
        picture=np.repeat(15 * cover[..., None], 3, 2).astype(np.uint8),
        cover=cover.astype(np.uint8),
        climate=np.where(cover > 0, 2, 0).astype(np.uint8),
        country=np.where(cover > 0, 0, -1).astype(np.int32),
        country_names=("Land",),
    )


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second style to train on: four squares whose colours tell the drawing."""
    icons = {slug(d.caption): _squares(d.sample_id) for d in read_drawings()}
    return write_icons(tmp_path_factory.mktemp("shapes"), icons)


def _squares(seed: int) -> dict[str, str]:
    colours = np.random.default_rng(seed).integers(1 << 24, size=4)
    places = ((0, 0), (16, 0), (0, 16), (16, 16))
    parts = [
        f'<rect x="{x}" y="{y}" width="16" height="16" fill="#{colour:06x}"/>'
        for (x, y), colour in zip(places, colours, strict=True)
    ]
    return {"body": "".join(parts)}


def test_a_plan_is_packed_run_and_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    maps: EarthMaps,
    shapes: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "plans"
    folder.mkdir()
    monkeypatch.setattr(plans, "FOLDER", folder)
    monkeypatch.setattr(styles, "build", partial(styles.build, limit=120))
    monkeypatch.setattr(earth, "build", partial(earth.build, stride=64))
    monkeypatch.setattr(datasets, "read_maps", lambda path: maps)
    monkeypatch.setattr(earth, "versions", dict)
    arms = ["two stages"]
    tree = {**TREE, "arms": arms, "seeds": [0], "tuned": {
        name: dict.fromkeys(arms, {"lr": 1, "label_weight": 1}) for name in ("styles", "earth")
    }}  # fmt: skip
    path = folder / "small.json"
    path.write_text(json.dumps(tree))
    plan = read_plan("small")
    steps = {"siameseim": 2.0, "category + caption": 1.0}
    plan.write_step_times({n: {m: [s] for m, s in steps.items()} for n in plan.primary}, jobs=1)
    here = ["--plan", "small", "--jobs", "2"]
    for name in ("data", "out", "ledger"):
        here += [f"--{name}", f"{tmp_path / name}"]
    with pytest.raises(ValueError, match="countries: expected countries-50m.json"):
        main([*here, "--pack", "--iconify", f"{shapes}"])
    main([*here, "--pack", "--iconify", f"{shapes}", "--countries", "none.json"])
    told = capsys.readouterr().out
    digests, end = json.JSONDecoder().raw_decode(told, told.index("{"))
    assert len(digests) == 8
    splits = ("heldout_other_styles", "heldout_seen_style")
    assert all(f"styles-fold-0, {split}: " in told[end:] for split in splits)
    assert "earth-fold-0-tune, tune: " in told[end:]  # nothing leaks, and it is told
    with pytest.raises(ValueError, match=r"styles-fold-0-tune: expected the data set of the plan"):
        main(here)
    path.write_text(json.dumps({**tree, "data": digests}))
    with pytest.raises(ValueError, match="not committed"):
        main(here)
    _git(folder, "init", "--quiet")
    _commit(folder)
    main([*here, "--sets", "earth"])
    main(here)
    rows = [*read_rows(SUBJECT, folder=tmp_path / "ledger")]
    plan = read_plan("small")
    found = finished(plan, tmp_path / "ledger")
    assert len(rows) == len(found) == 4 and {*found} == {*plan.counted_runs()}
    for run, figures in found.items():
        measure = plan.primary[run.data_set]
        if run.arm == BASELINES:
            assert set(figures["measured"]) == {"untrained", "pixels"}
            continue
        assert [stage["num_steps"] for stage in figures["stages"]] == list(plan.steps(run))
        assert all("loss/total" in stage["logged"] for stage in figures["stages"])
        told, counts = counts_by_cluster(measure_of(figures, "trained", measure))
        assert len(told) == len(set(told)) > 3
        assert figures["measured"]["trained"][measure] == pytest.approx(float(figure(counts)))
        also = {"styles": "linear_top1_every_style_hard", "earth": "patch_top1"}[run.data_set]
        assert 0 <= figures["measured"]["trained"][also] <= 1

    main(here)  # what has a row is not run again
    assert len([*read_rows(SUBJECT, folder=tmp_path / "ledger")]) == 4
    again = [*here[:-2], "--ledger", f"{tmp_path / 'again'}"]
    again[again.index("--out") + 1] = f"{tmp_path / 'out_again'}"
    main([*again, "--sets", "earth", "--arms", "two stages"])
    [(run, figures)] = finished(plan, tmp_path / "again").items()  # the same bits
    for what in ("measured", "clusters", "found"):
        assert figures[what] == found[run][what]
    losses = [stage["final_loss"] for stage in figures["stages"]]
    assert losses == [stage["final_loss"] for stage in found[run]["stages"]]
    capsys.readouterr()
    main([*here, "--table-only"])
    assert "two stages" in capsys.readouterr().out
