"""m3i-fast search: what it prints, what it refuses, and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from m3i_fast.cli import main


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C reaches a process that is started here, also from the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def started(run: Path, data: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "m3i_fast.cli", "search", str(run), "--data", str(data)]
    return subprocess.Popen(
        [*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.usefixtures("interrupts")
def test_it_serves_the_page_until_ctrl_c(run: Path, folder: Path, tmp_path: Path) -> None:
    process = started(run, folder, "--port", "0", "--cache-dir", str(tmp_path))
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), process.communicate(timeout=30)
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        connection.request("GET", "/")
        assert b"7 pictures of animals" in connection.getresponse().read()
        question = json.dumps({"words": "a cat"}).encode()
        connection.request("POST", "/search", question, {"Content-Type": "application/json"})
        assert len(json.loads(connection.getresponse().read())["results"]) == 7
        process.send_signal(signal.SIGINT)  # while the connection is open
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0 and output == ""
    assert "stopped" in errors and "Traceback" not in errors
    assert "left out: picture 7" in " ".join(errors.split())
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=5)
    assert (tmp_path / "search").is_dir() and os.listdir(tmp_path) == ["search"]


def test_a_port_in_use_is_told_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = ["search", str(tmp_path / "no-run"), "--data", str(tmp_path)]
        assert main([*command, "--port", str(port)]) == 2
    assert f"--port: {port} of 127.0.0.1 is in use: name another one, or 0" in said(capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "port: expected"),
        (["--batch-size", "0"], "batch_size: expected"),
    ],
)
def test_wrong_numbers_are_told(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["search", "runs/none", "--data", str(tmp_path), *flags])
    assert ended.value.code == 2 and message in said(capsys)


def test_what_is_not_there_is_told(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    anywhere = ["--port", "0", "--cache-dir", str(tmp_path / "cache")]
    assert main(["search", str(tmp_path), "--data", str(folder), *anywhere]) == 2
    assert f"no run in {tmp_path}: expected" in said(capsys)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["search", str(run), "--data", str(empty), *anywhere]) == 2
    assert f"--data: expected pictures, tars or Parquet files below {empty}" in said(capsys)
    assert not (tmp_path / "cache").exists()


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from m3i_fast.cli import main\n"
        "try: main(['search', '--help'])\n"
        "except SystemExit: sys.exit(('torch' in sys.modules) * 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--data" in done.stdout, done.stderr
