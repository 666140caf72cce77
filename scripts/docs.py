"""Build the site of docs/ into build/docs, for `make docs`.

    python -m scripts.docs [OUT]

Every warning is an error: a page without navigation, a broken link or anchor, a missing picture.
All pages are written anew, since some are generated from the code. The network is not used.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.cmd.build import build_main

ROOT = Path(__file__).resolve().parent.parent


def build(source: Path, out: Path) -> int:
    """Build the pages of a folder with the settings of docs/; returns Sphinx's exit status."""
    settings = ["--conf-dir", str(ROOT / "docs"), "--doctree-dir", str(out.parent / "doctrees")]
    strict = ["--fail-on-warning", "--nitpicky", "--keep-going", "--fresh-env", "--write-all"]
    return build_main([*strict, *settings, "--builder", "html", "--quiet", str(source), str(out)])


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "docs")
    status = build(ROOT / "docs", out)
    if not status:
        print(f"open {out / 'index.html'}")
    sys.exit(status)
