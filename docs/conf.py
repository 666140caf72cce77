"""How Sphinx builds the site. `make docs` runs `scripts/docs.py`, which makes warnings errors."""

import sys
from pathlib import Path

from m3i_fast import __version__

sys.path.insert(0, str(Path(__file__).parent))

project = "m3i-fast"
author = "the authors of m3i-fast"
release = version = __version__

extensions = ["myst_parser", "sphinx_copybutton", "builder"]
# Warnings of Sphinx itself are all errors; none is suppressed.
nitpicky = True
root_doc = "index"
smartquotes = False  # it would make one long dash of the two of --field

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3  # as GitHub makes them, so that a link to a heading works on both

html_theme = "furo"
html_title = "m3i-fast"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_use_index = False  # the search finds fields and terms
html_show_copyright = html_copy_source = html_show_sphinx = False
pygments_style, pygments_dark_style = "friendly", "github-dark"
copybutton_exclude = ".linenos, .gp, .go"
