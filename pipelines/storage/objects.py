"""Reading and writing objects under a URL (s3, gs, https) or in a folder, with bounded retries.

obstore sends the requests. It tries each once: what is repeated, for how long, and what an error
says is decided here, alike for a refused request and a body that is cut off.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from m3i_fast.pipelines.optional_imports import require
from m3i_fast.pipelines.storage.requests import ForkedError, Stop

logger = logging.getLogger(__name__)

PIECE = 16 << 20
"""Bytes of one read of a large object, which has its own time limit and is in memory as a whole."""
_Result = TypeVar("_Result")
_URL = re.compile(r"(s3|gs|https?):/+(?=[^/])")
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_KIND = re.compile(r"HttpError \{\s*kind: (\w+)")  # Connect, Timeout, Interrupted
_PASSING_CLIENT_ERRORS = (408, 425, 429)  # timeout, too early, too many requests
_TO_SET = {
    "s3": "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN of who may do this, "
    "AWS_REGION of the bucket, AWS_ENDPOINT_URL where the store is not Amazon's, or "
    "AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to the key file of who may do this, or "
    "GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "http": "give a URL that can be read without a login",
    "file": "give the folder rights to be read and written",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """Say how often and how long a request is repeated; times in seconds."""

    request_s: float = 60.0
    """Longest that one request may take, its body included."""
    give_up_s: float = 300.0
    """Time after which no further attempt is begun."""
    first_wait_s: float = 0.2
    """Wait after the first failure, which doubles each time; half of it is random."""
    longest_wait_s: float = 20.0

    def wait_s(self, attempt: int) -> float:
        """Draw the wait after attempt 1, 2, ..."""
        longest = min(self.first_wait_s * 2.0 ** min(attempt - 1, 30), self.longest_wait_s)
        return longest * random.uniform(0.5, 1.0)


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store knows of an object without reading it."""

    size: int
    etag: str | None  # None: the store has none
    sha256: str | None = None  # as `put` has noted it; None: not known


@dataclass(slots=True)
class RequestCounts:
    """Count what a store was asked since its bucket was opened."""

    ranges: int = 0  # ranged requests, repeated ones included
    retries: int = 0  # of all requests


class _IncompleteBody(Exception):
    """Fewer bytes came than the range has."""


def url_of(path: Path | str) -> str | None:
    """Return the URL that a path spells, or None for a path of this machine.

    A Path writes s3://bucket/set as s3:/bucket/set, which is read as the same.
    """
    text = str(path)
    found = _URL.match(text)
    return f"{found[1]}://{text[found.end() :]}".rstrip("/") if found else None


def place_of(path: Path | str) -> str:
    """Return a path as a person types it: a URL, or a path of this machine."""
    return url_of(path) or str(path)


def folder_of(url: str, cache_dir: Path, use: str) -> Path:
    """Return the local folder of what is done for a URL, by the name of its use and by the URL."""
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    return cache_dir.expanduser().absolute() / use / key


class Bucket:
    """Objects below a URL or a folder; safe to use from several threads.

    url: s3://bucket/prefix, gs://bucket/prefix, https://host/prefix (http:// too), or a folder.
    Credentials, region and endpoint come from the variables of the store's own tools (AWS_*,
    GOOGLE_*) or the machine's role. Every method raises PermissionError, FileNotFoundError,
    ValueError for an object that has changed, and ConnectionError where the retries' time is over;
    each names URL, range, attempts and what to set.
    """

    def __init__(self, url: Path | str, policy: RetryPolicy | None = None) -> None:
        self.policy = policy or RetryPolicy()
        remote = url_of(url)
        self.url = remote or str(Path(url).expanduser().absolute())
        self.scheme = remote.partition(":")[0].replace("https", "http") if remote else "file"
        self.counts = RequestCounts()
        self._counting = threading.Lock()
        self._obs = require("obstore", extra="cloud")
        self._store = self._open()

    def _open(self) -> Any:
        stores = require("obstore.store", extra="cloud")
        if self.scheme == "file":
            return stores.LocalStore(prefix=self.url, mkdir=True)
        names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
        endpoint = next((os.environ[name] for name in names if name in os.environ), "")
        plain = self.url if self.scheme == "http" else endpoint
        options = {
            "timeout": f"{round(self.policy.request_s * 1000)}ms",
            "connect_timeout": f"{round(min(self.policy.request_s, 10.0) * 1000)}ms",
            "allow_http": plain.startswith("http://"),
        }
        kind = {"s3": stores.S3Store, "gs": stores.GCSStore, "http": stores.HTTPStore}[self.scheme]
        return kind.from_url(self.url, client_options=options, retry_config={"max_retries": 0})

    def read(self, name: str, *, stop: Stop | None = None) -> bytes:
        """Read a whole object into memory; stop: as of `read_range`."""

        async def attempt() -> bytes:
            return bytes(await (await self._obs.get_async(self._store, name)).bytes_async())

        return self._repeated(name, "", attempt, stop)

    def read_range(
        self,
        name: str,
        start: int,
        end: int,
        *,
        expected: ObjectInfo | None = None,
        stop: Stop | None = None,
    ) -> memoryview:
        """Read bytes start to end - 1; with `expected`, refuse an object that is not that one.

        stop: where it is set, the request is given up and ConnectionError is raised.
        """
        what = f" bytes {start} to {end - 1}"

        async def attempt() -> memoryview:
            with self._counting:
                self.counts.ranges += 1
            result = await self._obs.get_async(self._store, name, options={"range": (start, end)})
            self._check(name, expected, _info(result))
            content = memoryview(await result.bytes_async())
            if len(content) != end - start:
                raise _IncompleteBody(f"expected {end - start} bytes, got {len(content)}")
            return content

        return self._repeated(name, what, attempt, stop)

    def info(self, name: str, *, stop: Stop | None = None) -> ObjectInfo:
        """Ask for size, ETag and noted digest of an object; stop: as of `read_range`."""

        async def attempt() -> ObjectInfo:
            return _info(await self._obs.get_async(self._store, name, options={"head": True}))

        return self._repeated(name, "", attempt, stop)

    def infos(self, names: list[str]) -> dict[str, ObjectInfo]:
        """Return what is known of each of many objects; FileNotFoundError names a missing one.

        A bucket is listed, a thousand objects a request. A web server cannot be, and each is asked.
        """
        if self.scheme == "http":
            return {name: self.info(name) for name in names}
        found = self.list()
        for name in names:
            if name not in found:
                raise FileNotFoundError(
                    f"{self.url}/{name}: expected an object, got none; upload the data again "
                    "(m3i-fast data push)"
                )
        return {name: found[name] for name in names}

    def found(self, names: list[str]) -> dict[str, ObjectInfo]:
        """Return what is known of those of many objects that are there."""
        if self.scheme != "http":
            there = self.list()
            return {name: there[name] for name in names if name in there}
        found = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found[name] = self.info(name)
        return found

    def list(self) -> dict[str, ObjectInfo]:
        """Return every object below the URL, by name."""
        return self._repeated("", " (list)", self._listed)

    async def _listed(self) -> dict[str, ObjectInfo]:
        metas = [meta async for part in self._obs.list(self._store) for meta in part]
        return {meta["path"]: ObjectInfo(meta["size"], meta["e_tag"]) for meta in metas}

    def put(
        self,
        name: str,
        content: bytes | Path,
        *,
        sha256: str | None = None,
        stop: Stop | None = None,
    ) -> None:
        """Write an object, which appears whole or not at all; large files are sent in parts.

        sha256: digest of the content, kept with it where the store can (s3, gs). stop: as of
        `read_range`.
        """
        noted = {"sha256": sha256} if sha256 and self.scheme in ("s3", "gs") else None

        async def attempt() -> None:
            await self._obs.put_async(self._store, name, content, attributes=noted)

        self._repeated(name, " (put)", attempt, stop)

    def create(self, name: str, content: bytes) -> bool:
        """Write a small object that is not there; return False where one is, which is kept.

        A request whose answer was lost may have written it: then the object there is this one.
        """
        exceptions = require("obstore.exceptions", extra="cloud")

        async def attempt() -> bool:
            try:
                await self._obs.put_async(
                    self._store, name, content, mode="create", use_multipart=False
                )
            except exceptions.AlreadyExistsError:
                return False
            return True

        return self._repeated(name, " (create)", attempt)

    def remove(self, names: Sequence[str]) -> None:
        """Remove those of these objects that are there, a thousand a request where the store can.

        They are listed before each attempt, since some stores refuse to remove what is gone.
        """

        async def attempt() -> None:
            there = await self._listed()
            if left := [name for name in names if name in there]:
                await self._obs.delete_async(self._store, left)

        self._repeated("", " (remove)", attempt)

    def _check(self, name: str, expected: ObjectInfo | None, got: ObjectInfo) -> None:
        if expected is None:
            return
        same_tag = None in (expected.etag, got.etag) or expected.etag == got.etag
        if expected.size != got.size or not same_tag:
            raise ValueError(
                f"{self.url}/{name}: changed while it was read: expected ETag {expected.etag} of "
                f"{expected.size} bytes, got {got.etag} of {got.size}; a data set is not to be "
                "changed in place: upload the new one under another URL, and start again"
            )

    def _repeated(
        self,
        name: str,
        what: str,
        attempt: Callable[[], Coroutine[Any, Any, _Result]],
        stop: Stop | None = None,
    ) -> _Result:
        """Try until it succeeds, fails for good, the time is over, or `stop` is set."""
        stop = stop or Stop()
        begin = time.monotonic()
        place = f"{self.url}/{name}{what}" if name else f"{self.url}{what}"
        number = 0
        while True:
            number += 1
            try:
                return stop.run(attempt)
            except CancelledError:
                raise ConnectionError(f"{place}: stopped, since its reader was closed") from None
            except Exception as error:
                self._raise_if_final(error, place)
                wait = self.policy.wait_s(number)
                spent = time.monotonic() - begin
                if spent + wait > self.policy.give_up_s:
                    raise ConnectionError(
                        f"{place}: gave up after {number} attempts in {spent:.0f} s; the last one: "
                        f"{_first_line(error)}; check the network and the store, and "
                        f"{_TO_SET[self.scheme]}"
                    ) from error
                logger.warning(
                    "%s: attempt %d failed, the next one in %.1f s: %s",
                    place,
                    number,
                    wait,
                    _first_line(error),
                )
            stop.wait(wait)
            if not stop.is_set():
                with self._counting:
                    self.counts.retries += 1

    def _raise_if_final(self, error: Exception, place: str) -> None:
        """Raise what no repetition can change, with what to do."""
        exceptions = require("obstore.exceptions", extra="cloud")
        if isinstance(error, ForkedError) or (
            isinstance(error, ValueError) and not isinstance(error, exceptions.BaseError)
        ):
            raise error
        status = _STATUS.search(str(error))
        number = int(status[1]) if status else 0
        to_set = _TO_SET[self.scheme]
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(
                f"{place}: not found ({_first_line(error)}); {to_set}"
            ) from error
        refused = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        if isinstance(error, refused) or "ExpiredToken" in str(error):
            raise PermissionError(f"{place}: refused ({_first_line(error)}); {to_set}") from error
        if isinstance(error, NotImplementedError) or (
            300 <= number < 500 and number not in _PASSING_CLIENT_ERRORS
        ):
            raise ValueError(f"{place}: {_first_line(error)}; {to_set}") from error


def _info(result: Any) -> ObjectInfo:
    """Return what a response says of its object."""
    return ObjectInfo(
        result.meta["size"], result.meta["e_tag"], (result.attributes or {}).get("sha256")
    )


def _first_line(error: BaseException) -> str:
    """Return the error without obstore's dump of its insides, and the store's own code for it."""
    text = str(error) or type(error).__name__
    code = _CODE.search(text)
    line = text.splitlines()[0]
    line = re.sub(r"<\?xml.*", "", line).strip(" :")
    kind = _KIND.search(text)
    parts = [line]
    if code:
        parts.append(f"code {code[1]}")
    elif kind:
        parts.append(f"kind {kind[1]}")
    return ", ".join(parts)
