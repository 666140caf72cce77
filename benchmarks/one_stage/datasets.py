"""The data sets that a plan's runs read: each fold of both, partly and wholly annotated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3i_fast.benchmarks.one_stage.arms import Stage, Tuning
from m3i_fast.benchmarks.one_stage.leaks import (
    Separation,
    separation_of_earth,
    separation_of_styles,
)
from m3i_fast.benchmarks.one_stage.plan import Plan, Run, SetName
from m3i_fast.pipelines.dataset.manifest import is_dataset, read_manifest
from m3i_fast.pipelines.sources import earth, styles
from m3i_fast.pipelines.sources.earth_maps import EarthMaps, read_maps
from m3i_fast.recipes.demo import DEMO_MERGES


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """A data set to be packed, below the folder of all data."""

    name: str
    data_set: SetName
    options: dict[str, Any]
    """Of the source's `build`."""
    masks: str | None
    """Name of the folder of the Earth's tiles and land cover, of one of a fold's data sets."""


def folders(plan: Plan) -> Iterator[Folder]:
    """Yield every data set that the plan's runs read, once."""
    seen: set[str] = set()
    stages = [Stage(method) for method in plan.methods]
    for run in (*plan.tuning_runs(), *_one_a_fold(plan)):
        whole, partly = plan.folder(run, is_whole=True), plan.folder(run, is_whole=False)
        for name in (whole, *(plan.stage_folder(run, stage) for stage in stages)):
            if name in seen:
                continue
            seen.add(name)
            is_whole = name == whole
            shares = (1.0, 1.0) if is_whole else (plan.labelled, plan.captioned)
            only = {} if name in (whole, partly) else {"annotated_only": True}
            of_styles = {"other_styles": True} if run.is_counted else {}
            yield Folder(
                name=name,
                data_set=run.data_set,
                options={
                    **(of_styles if run.data_set == "styles" else {}),
                    **only,
                    "heldout": plan.heldout,
                    "fold": plan.fold(run),
                    "tune": 0.0 if run.is_counted else plan.tuning.share,
                    "labelled": shares[0],
                    "captioned": shares[1],
                    "num_merges": DEMO_MERGES,
                },
                masks=masks_of(plan, run) if is_whole and run.data_set == "earth" else None,
            )


def _one_a_fold(plan: Plan) -> Iterator[Run]:
    for seed in plan.seeds:
        for name in plan.primary:
            yield Run(data_set=name, arm=plan.arms[0], seed=seed, tuning=Tuning(), is_counted=True)


def masks_of(plan: Plan, run: Run) -> str:
    """Return the name of the folder of tiles and land cover of a run's fold."""
    return plan.folder(run, is_whole=True) + "-masks"


def pack(plan: Plan, data: Path, *, iconify: tuple[Path, ...], countries: Path | None) -> None:
    """Write the plan's data sets that are not there. Raises as the sources' `build`."""
    maps: EarthMaps | None = None
    for each in folders(plan):
        out = data / each.name
        if is_dataset(out):
            continue
        if each.data_set == "styles":
            styles.build(out, iconify=iconify, **each.options)
            continue
        if countries is None:
            raise ValueError(
                "countries: expected countries-50m.json of npm's world-atlas, got none"
            )
        maps = maps or read_maps(countries)
        masks = None if each.masks is None else data / each.masks
        earth.build(out, countries=countries, maps=maps, masks=masks, **each.options)


def separations(plan: Plan, data: Path) -> Iterator[Separation]:
    """Yield how far every measured split lies from training. Raises ValueError where one leaks."""
    for each in folders(plan):
        if each.masks is not None:
            yield from separation_of_earth(data / each.name, data / each.masks)
        elif each.data_set == "styles" and each.options["labelled"] == 1:
            yield from separation_of_styles(data / each.name)


def expect_data(plan: Plan, data: Path) -> None:
    """Raise FileNotFoundError or ValueError unless all data sets are those of the plan."""
    for each in folders(plan):
        path = data / each.name
        if not is_dataset(path):
            raise FileNotFoundError(
                f"{path}: expected a data set, got none; type m3i-fast bench one-stage --plan "
                f"{plan.name} --pack --iconify NOTO FLUENT EMOJIONE --countries FILE"
            )
        expected, got = plan.data.get(each.name), read_manifest(path).digest
        if got != expected:
            raise ValueError(
                f"{path}: expected the data set of the plan, manifest {str(expected)[:12]}, got "
                f"{got[:12]}; remove it and pack it again, with the packages that the page names"
            )


def digests(plan: Plan, data: Path) -> dict[str, str]:
    """Return what a plan's `data` says of the data sets that are there."""
    return {each.name: read_manifest(data / each.name).digest for each in folders(plan)}
