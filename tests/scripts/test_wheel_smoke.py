"""What `make wheels` calls missing: files beside the package that a checkout alone has."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import wheel_smoke


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Site-packages with a wheel of ours, of which nothing was opened yet."""
    for name in ("m3i_fast/page.css", "m3i_fast/ops.py", "torch/version.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(wheel_smoke, "_opened", set())
    return tmp_path


def test_data_files_are_those_that_were_opened_beside_the_code(site: Path) -> None:
    """Not code, what Python makes of it and renames at once, or files of others."""
    cached = "m3i_fast/__pycache__/ops.cpython-311.pyc"
    opened = ("m3i_fast/page.css", "m3i_fast/ops.py", "torch/version.txt", "nothing.txt")
    wheel_smoke._opened |= {str(site / name) for name in (*opened, cached, f"{cached}.140558")}
    assert wheel_smoke.data_files(site / "m3i_fast") == ["m3i_fast/page.css"]


@pytest.mark.parametrize("name", ["m3i_fast/report.html", "docs/start/adapt.md", "cuda/tiles.json"])
def test_what_a_checkout_alone_has_is_missing(name: str, site: Path) -> None:
    wheel_smoke._opened.add(str(site / name))
    with pytest.raises(FileNotFoundError, match=f"not in the wheel: .*{name}"):
        wheel_smoke.data_files(site / "m3i_fast")
