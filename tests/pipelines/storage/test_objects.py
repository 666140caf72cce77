"""Objects of a real S3 server: every fault ends in success or in one clear error."""

from __future__ import annotations

import functools
import http.server
import os
import re
import threading
from pathlib import Path

import pytest

from m3i_fast.pipelines.storage.objects import Bucket, ObjectInfo, RetryPolicy, url_of
from tests.shared.pipelines.s3_server import S3Server, cut, refuse, slow

PATIENT = RetryPolicy(request_s=1.5, first_wait_s=0.01, longest_wait_s=0.1)
QUICK = RetryPolicy(request_s=1.5, give_up_s=1.0, first_wait_s=0.01, longest_wait_s=0.1)
CONTENT = bytes(range(256)) * 40


@pytest.fixture
def bucket(url: str, server: S3Server) -> Bucket:
    """A bucket with one object, part/0.tar."""
    made = Bucket(url, PATIENT)
    made.put("part/0.tar", CONTENT, sha256="ab12")
    server.clear()
    return made


def test_what_is_put_is_read_listed_and_described(bucket: Bucket) -> None:
    assert bucket.read("part/0.tar") == CONTENT
    assert bytes(bucket.read_range("part/0.tar", 300, 700)) == CONTENT[300:700]
    info = bucket.info("part/0.tar")
    assert (info.size, info.sha256) == (len(CONTENT), "ab12")
    assert info.etag and bucket.infos(["part/0.tar"])["part/0.tar"].etag == info.etag


def test_a_large_file_is_put_in_parts(bucket: Bucket, tmp_path: Path) -> None:
    content = os.urandom(11 << 20)
    (tmp_path / "large").write_bytes(content)
    bucket = Bucket(bucket.url)
    bucket.put("large", tmp_path / "large", sha256="cd")
    assert bucket.read("large") == content and bucket.info("large").sha256 == "cd"
    assert list(bucket.list()) == ["large", "part/0.tar"]


@pytest.mark.parametrize(
    "fault",
    [refuse("503 Slow Down", "SlowDown"), refuse("429 Too Many", "Throttled"), cut, slow(2.0)],
    ids=["503", "429", "cut", "slow"],
)
def test_a_passing_fault_is_repeated_until_the_bytes_are_right(
    bucket: Bucket, server: S3Server, fault: object, caplog: pytest.LogCaptureFixture
) -> None:
    server.fault("0.tar", fault, 2)
    assert bytes(bucket.read_range("part/0.tar", 5, 5_000)) == CONTENT[5:5_000]
    assert server.requests["GET 0.tar"] == 3
    assert "0.tar bytes 5 to 4999: attempt 2 failed, the next one in" in caplog.text


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (refuse("503 Slow Down", "SlowDown"), "503 Service Unavailable, code SlowDown"),
        (cut, "kind Interrupted"),
        (slow(2.0), "kind Timeout"),
    ],
    ids=["503", "cut", "slow"],
)
def test_a_lasting_fault_is_one_error_within_the_time(
    bucket: Bucket, server: S3Server, fault: object, told: str
) -> None:
    server.fault("0.tar", fault, 1_000)
    with pytest.raises(ConnectionError, match=told) as failed:
        Bucket(bucket.url, QUICK).read_range("part/0.tar", 0, 5_000)
    assert 1 <= server.requests["GET 0.tar"] < 1_000  # waits grow, and 1 s is soon over
    message = str(failed.value)
    assert re.search(r"set/part/0.tar bytes 0 to 4999: gave up after \d+ attempts", message)
    assert "AWS_ENDPOINT_URL" in message and "Debug source" not in message


@pytest.mark.parametrize(
    ("status", "code"),
    [("403 Forbidden", "ExpiredToken"), ("403 Forbidden", "AccessDenied"),
     ("400 Bad Request", "ExpiredToken"), ("401 Unauthorized", "InvalidToken")],
)  # fmt: skip
def test_refused_credentials_are_told_at_once(
    bucket: Bucket, server: S3Server, status: str, code: str
) -> None:
    server.fault("0.tar", refuse(status, code), 1_000)
    with pytest.raises(PermissionError, match=f"0.tar.*refused.*{code}.*AWS_ACCESS_KEY_ID"):
        bucket.read("part/0.tar")
    assert server.requests["GET 0.tar"] == 1


def test_a_changed_object_is_refused_by_name(bucket: Bucket, server: S3Server) -> None:
    known = bucket.infos(["part/0.tar"])["part/0.tar"]
    assert bytes(bucket.read_range("part/0.tar", 0, 9, expected=known)) == CONTENT[:9]
    bucket.put("part/0.tar", CONTENT[::-1])
    server.clear()
    with pytest.raises(ValueError, match=r"part/0.tar: changed while it was read: expected ETag"):
        bucket.read_range("part/0.tar", 0, 9, expected=known)
    bucket.put("part/0.tar", CONTENT[:100])
    with pytest.raises(ValueError, match=r"part/0.tar bytes 5000 to 5008.*416"):
        bucket.read_range("part/0.tar", 5_000, 5_009, expected=known)
    assert server.requests["GET 0.tar"] == 2


def test_what_is_missing_is_named(bucket: Bucket, server: S3Server) -> None:
    with pytest.raises(FileNotFoundError, match=r"some/set/none.tar: not found.*NoSuchKey"):
        bucket.read("none.tar")
    with pytest.raises(FileNotFoundError, match=r"1.tar: expected an object, got none"):
        bucket.infos(["part/0.tar", "part/1.tar"])
    with pytest.raises(FileNotFoundError, match=r"NoSuchBucket.*AWS_REGION"):
        Bucket("s3://no-such-bucket/set", QUICK).read("x")
    assert server.requests["GET none.tar"] == 1


def test_a_store_that_is_not_there_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(ConnectionError, match=r"s3://b/set/x: gave up.*AWS_ENDPOINT_URL"):
        Bucket("s3://b/set", QUICK).read("x")


def test_a_folder_is_a_bucket_too(tmp_path: Path) -> None:
    folder = Bucket(tmp_path / "set", QUICK)
    folder.put("a/b", CONTENT, sha256="ab")
    assert (tmp_path / "set/a/b").read_bytes() == CONTENT
    info = folder.infos(["a/b"])["a/b"]
    assert bytes(folder.read_range("a/b", 1, 4, expected=info)) == CONTENT[1:4]
    (tmp_path / "set/a/b").write_bytes(CONTENT + b"x")
    with pytest.raises(ValueError, match="changed while it was read"):
        folder.read_range("a/b", 1, 4, expected=info)
    with pytest.raises(FileNotFoundError, match="none: not found"):
        folder.read("none")


def test_a_web_server_that_ignores_ranges_is_refused(tmp_path: Path) -> None:
    """Python's own web server sends the whole file, whatever range it is asked for."""
    (tmp_path / "0.tar").write_bytes(CONTENT)
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        bucket = Bucket(f"http://127.0.0.1:{web.server_port}", QUICK)
        assert bucket.read("0.tar") == CONTENT
        assert bucket.infos(["0.tar"]) == {"0.tar": ObjectInfo(len(CONTENT), None)}
        with pytest.raises((ValueError, ConnectionError), match=r"0.tar bytes 1 to 3.*[Rr]ange"):
            bucket.read_range("0.tar", 1, 4)
        web.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Keep the test's output free of requests."""


def test_urls_survive_being_a_path() -> None:
    for url in ("s3://bucket/a/set", "gs://bucket", "https://host/set"):
        assert url_of(url) == url_of(Path(url)) == url_of(url + "/") == url
    for path in ("data/openmoji", "/s3/x", "s3", "C:/x"):
        assert url_of(path) is None
