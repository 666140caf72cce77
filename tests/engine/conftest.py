from pathlib import Path

import pytest

from m3i_fast.pipelines import openmoji


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty OpenMoji concepts, a part of them annotated only in part."""
    out = tmp_path_factory.mktemp("data") / "openmoji"
    return openmoji.build(out, limit=60, labelled=0.5, num_merges=300, context_length=24)
