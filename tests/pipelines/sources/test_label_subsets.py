"""Shares of concepts: exact, contained in each other, balanced over categories, independent."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from scipy.stats import hypergeom

from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.sources.concepts import read_drawings
from m3i_fast.pipelines.sources.label_subsets import annotate, keep_share
from tests.pipelines.sources.test_openmoji import build, kinds, rows

SHARES = (0.0, 0.001, 0.01, 0.1, 0.35, 0.5, 0.999, 1.0)
# Sizes as unlike as OpenMoji's; one category has a single concept.
SIZES = {"flags": 258, "faces": 160, "food": 130, "signs": 17, "odd": 1}
CATEGORY_OF = {
    1000 * i + j: name for i, (name, size) in enumerate(SIZES.items()) for j in range(size)
}


@pytest.mark.parametrize("share", SHARES)
def test_every_category_keeps_the_share_and_at_least_one_concept(share: float) -> None:
    found = Counter(CATEGORY_OF[group] for group in keep_share(CATEGORY_OF, share, "class", 3))
    for name, size in SIZES.items():
        if share == 0:
            assert found[name] == 0
        elif share * size <= 1:
            assert found[name] == 1
        else:
            assert abs(found[name] - share * size) <= 0.5


def test_a_larger_share_contains_a_smaller_one() -> None:
    kept = [keep_share(CATEGORY_OF, share, "class", 3) for share in SHARES]
    assert all(few <= more for few, more in zip(kept, kept[1:], strict=False))
    assert kept[-1] == CATEGORY_OF.keys()
    assert len({len(groups) for groups in kept}) >= 6


def test_the_draw_follows_seed_and_kind_and_no_other_category() -> None:
    kept = keep_share(CATEGORY_OF, 0.3, "class", 3)
    assert kept == keep_share(dict(reversed(CATEGORY_OF.items())), 0.3, "class", 3)
    assert kept != keep_share(CATEGORY_OF, 0.3, "class", 4)
    assert kept != keep_share(CATEGORY_OF, 0.3, "caption", 3)
    flags = {group: name for group, name in CATEGORY_OF.items() if name == "flags"}
    assert keep_share(flags, 0.3, "class", 3) == {g for g in kept if CATEGORY_OF[g] == "flags"}


def test_label_and_caption_are_drawn_independently() -> None:
    """Concepts with both, of one category, follow the hypergeometric law of two free draws."""
    groups = dict.fromkeys(range(200), "flags")
    overlaps = []
    for seed in range(200):
        kept = Counter(annotate(groups, seed=seed, labelled=0.25, captioned=0.5).values())
        assert kept["both"] + kept["class"] == 50 and kept["both"] + kept["caption"] == 100
        assert sum(kept.values()) == 200 and min(kept.values()) > 0
        overlaps.append(kept["both"])
    law = hypergeom(200, 50, 100)
    mean, deviation = sum(overlaps) / 200, (law.var() / 200) ** 0.5
    assert abs(mean - law.mean()) < 4 * deviation
    assert law.ppf(1e-6) <= min(overlaps) < max(overlaps) <= law.ppf(1 - 1e-6)


def test_one_share_can_be_all_or_nothing() -> None:
    kept = annotate(CATEGORY_OF, seed=0, labelled=0.1, captioned=1.0)
    assert set(kept.values()) == {"both", "caption"} and kept.keys() == CATEGORY_OF.keys()
    assert set(annotate(CATEGORY_OF, seed=0, labelled=0.0, captioned=0.0).values()) == {"none"}
    assert set(annotate(CATEGORY_OF, seed=0, labelled=0.5, captioned=0.0).values()) == {
        "class",
        "none",
    }


def test_in_thirds_more_labels_keep_every_label_of_fewer() -> None:
    few = annotate(CATEGORY_OF, seed=3, labelled=0.2, captioned=None)
    more = annotate(CATEGORY_OF, seed=3, labelled=0.6, captioned=None)
    assert all(more[g] == "both" for g, kept in few.items() if kept == "both")
    assert all(more[g] == few[g] for g in few if more[g] != "both")
    whole = annotate(CATEGORY_OF, seed=3, labelled=1.0, captioned=None)
    assert set(whole.values()) == {"both"}
    assert few != annotate(CATEGORY_OF, seed=4, labelled=0.2, captioned=None)


def test_the_packed_shares(tmp_path: Path) -> None:
    """OpenMoji itself, its held-out concepts fully annotated whatever the shares."""
    path = build(tmp_path / "data", labelled=0.3, captioned=0.6, seed=1)
    category_of = {d.group_id: d.category for d in read_drawings() if d.sample_id == d.group_id}
    kept = kinds(path)
    sizes = Counter(category_of[group] for group in kept)
    assert len(sizes) > 5
    for kind, share in (("class", 0.3), ("caption", 0.6)):
        found = Counter(category_of[group] for group, words in kept.items() if kind in words)
        assert found == {name: max(round(share * size), 1) for name, size in sizes.items()}
    assert set(kept.values()) == {"caption class", "caption", "class", ""}
    assert all("tok" in row for row in rows(path, "heldout").values())
    manifest = read_manifest(path)
    assert (manifest.settings["labelled"], manifest.settings["captioned"]) == (0.3, 0.6)
    heldout = manifest.splits["heldout"]
    assert heldout.num_labels == heldout.num_captions == heldout.num_samples
