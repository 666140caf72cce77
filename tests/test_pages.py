"""The Python of README and docs is run as it stands there; links and paths lead somewhere."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from PIL import Image

from m3i_fast.cli import main
from m3i_fast.pipelines.sources import openmoji
from tests.shared.ranks import run_script
from tests.test_new_method import SMALL

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = (README, ROOT / "CONTRIBUTING.md", *DOCS)
FENCED = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
PYTHON = re.compile(r"(<!-- not run: [^>]+ -->\n)?```python\n(.*?)```", re.DOTALL)
FOLDERS = "m3i_fast|pipelines|benchmarks|cuda|tests|launch|scripts|docs"


def python_of(page: Path) -> list[str]:
    """The page's blocks of Python, but those below a `<!-- not run: REASON -->`."""
    return [code for mark, code in PYTHON.findall(page.read_text()) if not mark]


def prose_of(page: Path) -> str:
    return FENCED.sub("", page.read_text())


def anchors_of(page: Path) -> set[str]:
    """What GitHub, and the site, let a link name: the headings, in lower case with dashes."""
    titles = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


# ---- README --------------------------------------------------------------------------------------


def draw_pictures(folder: Path, extension: str) -> None:
    """Three pictures of noise in each of two classes."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.{extension}")


@pytest.fixture
def namespace(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the blocks leave behind, each run after the other."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "demo", "--out", "runs/demo", f"--data.path={dataset}", *SMALL]) == 0
    found: dict[str, Any] = {}
    blocks = python_of(README)
    assert len(blocks) == 1
    for block in blocks:
        exec(compile(block, str(README), "exec"), found)
    return found


def test_the_python_of_the_readme_does_what_it_says(namespace: dict[str, Any]) -> None:
    model, tokens = namespace["model"], namespace["tokens"]
    assert tokens.shape == (1, 64, model.num_features)
    for name, count in {"image": 1, "text": 2}.items():
        torch.testing.assert_close(namespace[name].norm(dim=-1), torch.ones(count))
    assert namespace["probabilities"].shape == (1, 2)
    torch.testing.assert_close(namespace["probabilities"].sum(), torch.tensor(1.0))
    a, b = (namespace[name].detach() for name in "ab")
    torch.testing.assert_close(namespace["loss"].detach(), ClipLoss()(a, b, torch.tensor(10.0)))
    assert namespace["a"].grad.abs().sum() > 0


# ---- docs ----------------------------------------------------------------------------------------

# What has to hold after all Python of a page has run, in the same process.
AFTER = {
    "start/data.md": """
from m3i_fast.pipelines.dataset.verification.verify import verify
train = verify(Path("data/mine"), decode=True).splits["train"]
assert (train.num_samples, train.num_captions, train.num_labels) == (4, 2, 2)
""",
    "measure/evaluate.md": """
assert 0 <= top1 <= 1 and results.encoders[0].figures().keys() >= {("zero-shot", "top 5")}
assert any(Path("cache/features").iterdir())
""",
    "start/pack.md": """
assert regions.boxes.shape == (4, 2, 4, 4) and regions.token_ids.shape[:3] == regions.mask.shape
assert regions.mask.any() and 0 <= regions.boxes.min() < regions.boxes.max() <= 1
""",
    "extend/new_method.md": """
from m3i_fast.recipes import recipes
(term,) = recipes()["demo_simdino"]().objective.terms
assert term.regulariser == "coding_rate"
""",
    "extend/loader.md": """
assert first.shape == second.shape == (8, 3, 64, 64) and first.dtype == torch.uint8
assert loss.isfinite() and loader.steps_per_epoch > 0
assert changed.shape == first.shape and not torch.equal(changed, first)
""",
    "extend/new_source.md": """
from m3i_fast.pipelines.dataset.verification.verify import verify
found = verify(Path("data/discs"), decode=True)
labels = {name: split.num_labels for name, split in found.splits.items()}
assert labels == {"train": 96, "heldout": 32}
""",
    "extend/ops.md": """
assert all(t.grad.abs().sum() > 0 for t in (pictures, captions, classes, predicted, x))
assert features.tokens.shape[:2] == (1, 14 * 14) and features.pooled.shape[0] == 1
""",
    "train/any_shape.md": """
alone = vit(pictures[1][None])[0]
torch.testing.assert_close(torch.cat([prefix[1], of_each[1]]), alone, rtol=1e-4, atol=1e-4)
assert 0.7 * 1024 < int(batch.grids.prod(2).sum()) <= 1024
assert images.shape == (sum(batch.lengths(0)), 192) and len(batch.patches) == 2
assert loss.isfinite() and objective.encoder.patch_embed.weight.grad.abs().sum() > 0
""",
    "train/teachers.md": """
assert list(cfg.objective.teachers.values()) == ["runs/demo", "timm:vit_small_patch16_224.dino"]
from m3i_fast.objectives.phi_s import read_statistics
mean, covariance = read_statistics(Path("demo.safetensors"), teacher.dim)
assert covariance.diagonal().min() > 0
""",
    "start/use_model.md": """
assert best in captions and named in model.class_names
assert vectors.shape == (2, model.num_features) == features.mean(1).shape
assert model.forward_head(features).equal(vectors)
""",
    "train/training.md": """
from pathlib import Path
assert outcome.step == 4 and outcome.signal is None
assert Path("runs/short/checkpoints/latest").read_text().strip() == "step_00000004"
""",
    "start/tutorial.md": """
torch.testing.assert_close(asked.norm(dim=-1), torch.ones(1))
assert {"loss/caption", "loss/total"} <= last.keys() and best in range(8)
""",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the pages speak of: the demo's data, a run of it, and own pictures."""
    place = tmp_path_factory.mktemp("pages")
    data = openmoji.build(
        place / "data" / "openmoji", limit=60, num_merges=500, max_variants=3, context_length=24
    )
    run = ["train", "demo", "--out", str(place / "runs" / "demo"), f"--data.path={data}"]
    assert main([*run, "--num-steps=2", "--log-every=1", "--device=cpu"]) == 0
    draw_pictures(place / "pictures", "jpg")
    for name, (folder, i) in {"street": ("dog", 0), "unknown": ("dog", 1)}.items():
        (place / "pictures" / folder / f"{i}.jpg").rename(place / "pictures" / f"{name}.jpg")
    (table,) = re.findall(
        r"```text\n(file,.*?)```", (ROOT / "docs/start/data.md").read_text(), re.S
    )
    (place / "pictures.csv").write_text(table)
    page = (ROOT / "docs/start/pack.md").read_text().partition("## Regions with a text\n")[2]
    (lines,) = re.findall(r"```text\n(.*?)```", page, re.S)
    (place / "pictures" / "regions.jsonl").write_text(lines)
    pack = ["data", "pack", str(place / "pictures"), str(place / "data" / "regions")]
    assert main([*pack, "--column", "regions:regions=regions.jsonl"]) == 0
    return place


def test_what_the_python_of_each_page_leaves_is_checked() -> None:
    with_python = [page for page in DOCS if python_of(page)]
    assert {page.relative_to(ROOT / "docs").as_posix() for page in with_python} == set(AFTER)


@pytest.mark.pages
@pytest.mark.parametrize("page", AFTER)
def test_the_python_of_a_page_runs(page: str, workplace: Path) -> None:
    script = workplace / f"{Path(page).stem}_page.py"
    blocks = [*python_of(ROOT / "docs" / page), AFTER[page]]
    script.write_text("\n".join(blocks).replace('if __name__ == "__main__":', "if False:"))
    run_script(script, folder=workplace)


# ---- Links and paths -----------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose_of(page))
    lost = []
    for link in links:
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            lost.append(link)
    assert lost == []
    assert links or page != README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_a_page_names_are_there(page: Path) -> None:
    """A path in `code`, unless a part of it is a word to fill in, such as SUBJECT or <op>."""
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", page.read_text())
    to_fill_in = re.compile(r"(^|[/_.-])[A-Z]{2,}([/_.-]|$)")
    lost = [n for n in named if not (ROOT / n).exists() and not to_fill_in.search(n)]
    assert lost == []
