"""Libraries that fetch weights are kept to their caches, unless the user allows a download."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from m3i_fast.pipelines.optional_imports import require


@contextmanager
def weights_from(spec: str, *, allow_download: bool, instead: str) -> Iterator[None]:
    """Keep Hugging Face's hub to its cache inside, and turn a library's errors into ValueError.

    instead: what else the user can type.
    """
    constants = require("huggingface_hub.constants", extra="timm")
    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = was_offline or not allow_download
    try:
        yield
    except (
        *(OSError, RuntimeError, ValueError, KeyError, AssertionError),
        *(TypeError, AttributeError),  # a config.json with fields of another type
    ) as error:
        allow = "" if allow_download else "; --allow-download fetches what is not in the cache"
        raise ValueError(f"{spec}: not opened: {error}; {instead}{allow}") from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def expect_cached(source: Mapping[str, Any], folder: Path, *, hub_key: str) -> None:
    """Raise FileNotFoundError for weights that lie at a URL alone and are not in a folder.

    source: what a library knows of its weights, with `url` and, by hub_key, the name on the hub,
    which knows by itself what is in its cache.
    """
    url = source.get("url")
    if url and not source.get(hub_key) and not source.get("file"):
        name = Path(urlsplit(str(url)).path).name
        if not (folder / name).is_file():
            raise FileNotFoundError(f"its weights lie at {url}, and there is no {folder / name}")
