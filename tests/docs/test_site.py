"""The site is built strictly, says all that it says it does, and fits a telephone."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.benchmarks.subjects import SUBJECTS
from m3i_fast.cli import VERBS
from m3i_fast.recipes import recipes
from tests.shared.chromium import emulate, open_browser, requested_by, skip_reason

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 400  # of a telephone, in pixels
# What leaves the window, but for what stands in a box that scrolls by itself.
OUTSIDE = """
const width = document.documentElement.clientWidth;
const scrolls = (e) => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
const inBox = (e) => e && e.tagName !== "ARTICLE" && (scrolls(e) || inBox(e.parentElement));
const end = (e) => {
  const box = e.getBoundingClientRect();
  return scrolls(e) ? box.right : Math.max(box.right, box.left + e.scrollWidth);
};
return [document.documentElement, ...document.querySelectorAll("article *")]
  .filter((e) => e.checkVisibility() && !inBox(e.parentElement) && end(e) > width + 1)
  .map((e) => `${e.tagName} "${e.textContent.trim().slice(0, 40)}"`);
"""


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Build a folder of pages as `make docs` builds docs/."""
    code = "import sys; from pathlib import Path; from scripts.docs import build; "
    code += "sys.exit(build(*map(Path, sys.argv[1:])))"
    command = [sys.executable, "-c", code, str(source), str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    out = tmp_path_factory.mktemp("site") / "html"
    done = build(ROOT / "docs", out)
    assert (done.returncode, done.stderr) == (0, "")
    return out


def text_of(site: Path, page: str) -> str:
    """What a reader of the page sees, in one line."""
    return html.unescape(re.sub(r"<[^>]+>", "", (site / page).read_text()))


def leaves(tree: Any, path: str = "") -> Iterator[str]:
    """Paths of all values in a config.json, each of several under N."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from leaves(value, f"{path}.{name}".lstrip("."))
    elif isinstance(tree, list) and tree and isinstance(tree[0], dict):
        yield from leaves(tree[0], f"{path}.N")
    else:
        yield path


def test_a_page_that_leads_nowhere_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / "index.md").write_text(
        "# Page\n\n[a](#nowhere) [b](missing.md) {where}`NoSuchName` ![c](missing.png)\n"
    )
    (tmp_path / "alone.md").write_text("# In no navigation\n")
    done = build(tmp_path, tmp_path / "out")
    assert done.returncode == 1
    for what in ("nowhere", "missing.md", "NoSuchName", "missing.png", "alone.md"):
        assert any(what in line for line in done.stderr.splitlines()), what


def test_every_page_is_built(site: Path) -> None:
    docs = ROOT / "docs"
    pages = {page.relative_to(docs).with_suffix(".html") for page in docs.rglob("*.md")}
    assert pages <= {page.relative_to(site) for page in site.rglob("*.html")}


@pytest.mark.parametrize("recipe", ["demo", "demo_internimage"])
def test_every_field_of_a_config_is_explained(site: Path, recipe: str) -> None:
    shown = (site / "reference" / "config.html").read_text()
    for path in leaves(json.loads(recipes()[recipe]().to_json())):
        one = rf'id="confval-{re.escape(path)}(-\w+)?".*?(?=<dt class="sig|<h2)'
        found = re.search(one, shown, re.DOTALL)
        assert found, path
        options, _, words = found[0].partition("</dl>")
        assert ">Type<" in options and ">Default<" in options, path
        assert re.search(r"<p>\S.*</p>", words, re.DOTALL), path


def test_what_recipes_change_is_shown(site: Path) -> None:
    shown = text_of(site, "reference/config.html")
    for name, build_recipe in recipes().items():
        if name in ("demo", "demo_internimage") or name.startswith("m3i_"):
            assert name in shown, name
            assert str(build_recipe().data.batch_size) in shown


def test_every_command_is_shown_with_its_help(site: Path) -> None:
    shown = text_of(site, "reference/commands.html")
    commands = [*VERBS, *(f"bench {name}" for name in SUBJECTS), "data verify", "checkpoint ls"]
    for command in commands:
        assert f"m3i-fast {command}" in shown, command
        assert f"usage: m3i-fast {command}" in shown, command
    # Of commands that take a recipe their own flags, and not the config's, which have a page.
    assert all(flag in shown for flag in ("--watchdog-minutes", "--utilisation X", "--warmup"))
    assert "--objective.decoder.dim" not in shown


@pytest.mark.skipif(bool(skip_reason()), reason=skip_reason() or "")
def test_no_page_is_cut_off_scrolls_sideways_or_asks_the_network(site: Path) -> None:
    with open_browser() as browser:
        for scheme, width in (("light", WIDTH), ("dark", 1280)):
            for page in sorted(site.rglob("*.html")):
                emulate(browser, width, scheme)
                browser.get_log("performance")  # forget the last page
                browser.get(page.as_uri())
                where = f"{page.relative_to(site)} at {width} px"
                assert browser.execute_script(OUTSIDE) == [], where
                asked = [url for url in requested_by(browser) if not url.startswith("data:")]
                assert all(url.startswith(site.as_uri()) for url in asked), (where, asked)
                messages = [entry["message"] for entry in browser.get_log("browser")]
                assert not messages, f"{where}: the console says {messages}"
