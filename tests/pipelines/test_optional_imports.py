"""What is said where a library is missing, and where it is there but does not import."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3i_fast.pipelines.optional_imports import require


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, 'no_such_library is not installed: pip install "m3i-fast[timm]"'),
        ("import no_such_library.inner", "no_such_library is not installed: "),
        (
            "from importlib.resources.no_such import Part",
            r"no_such_library does not import here \(No module named 'importlib.resources.no_such'",
        ),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "no_such_library.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=said.replace("[timm]", r"\[timm\]")):
        require("no_such_library", extra="timm")
