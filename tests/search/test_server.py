"""The server answers its own page, on loopback, and no one else."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from m3i_fast.search import answers as answers_module
from m3i_fast.search import server as server_module
from m3i_fast.search.answers import Answers
from m3i_fast.search.pictures import Pictures
from m3i_fast.search.server import JSON_TYPE, MOST_AT_ONCE, PICTURE_TYPE, SearchServer

JSON = {"Content-Type": JSON_TYPE}
PICTURE = {"Content-Type": PICTURE_TYPE}


def ask(
    server: SearchServer,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """One request in a connection of its own: status, headers and body of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def error_of(*asked: Any) -> tuple[int, str]:
    status, headers, body = ask(*asked)
    assert headers["Content-Type"] == JSON_TYPE
    return status, json.loads(body)["error"]


def search(server: SearchServer, question: object, **headers: str) -> tuple[int, Any]:
    status, _, body = ask(server, "POST", "/search", json.dumps(question).encode(), JSON | headers)
    return status, json.loads(body)


# ---- What it answers -----------------------------------------------------------------------------


def test_the_page_says_what_it_searches(server: SearchServer, answers: Answers) -> None:
    status, headers, body = ask(server, "GET", "/")
    html = body.decode()
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert f"{answers.about()['pictures']:,} pictures of openmoji" in html
    assert "default-src 'none'" in html and "http://" not in html and "https://" not in html
    assert headers["X-Frame-Options"] == "DENY" and headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in headers


def test_questions_are_answered_as_json(
    server: SearchServer, answers: Answers, pictures: Pictures
) -> None:
    status, found = search(server, {"words": "a red heart", "num": 3})
    assert status == 200 and len(found["results"]) == 3
    content = pictures.read(4)
    status, _, body = ask(server, "POST", "/add", content, PICTURE)
    added = json.loads(body)["query"]
    assert status == 200
    status, found = search(server, {"query": added["id"]})
    assert status == 200 and found["results"][0]["similarity"] == 1
    question = json.dumps({"query": added["id"], "cell": 0, "rows": [1, 2]}).encode()
    status, _, body = ask(server, "POST", "/patches", question, JSON)
    assert status == 200 and len(json.loads(body)["similarity"]) == 2
    for kind in ("thumbnail", "picture"):
        status, headers, body = ask(server, "GET", f"/{kind}/4?v")
        assert (status, body) == (200, getattr(answers, kind)(4).content)
        assert headers["Content-Type"] in ("image/png", "image/jpeg")


def test_a_connection_serves_many_requests(server: SearchServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    for _ in range(3):
        connection.request("POST", "/search", b'{"row": 0}', JSON)
        assert json.loads(connection.getresponse().read())["results"]
        connection.request("POST", "/search", b'{"row": -1}', JSON)
        assert "no picture" in json.loads(connection.getresponse().read())["error"]
    connection.close()


def test_many_ask_at_once(server: SearchServer) -> None:
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda row=row: found.append(search(server, {"row": row})[0]))
        for row in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 12


@pytest.mark.parametrize("path", ["/add", "/search", "/patches"])
def test_decoding_a_picture_lets_other_questions_pass(
    path: str,
    server: SearchServer,
    answers: Answers,
    pictures: Pictures,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status, first = search(server, {"row": 0})
    question: dict[str, Any] = {"query": first["query"]["id"], "cell": 0, "rows": [7]}
    question = question if path == "/patches" else {"row": 7}
    body = pictures.read(7) if path == "/add" else json.dumps(question).encode()
    begun, goes_on, decode = threading.Event(), threading.Event(), answers_module.view_of
    monkeypatch.setattr(answers, "_tokens", answers_module.Kept(4))

    def slow(*decoded: Any) -> Any:
        begun.set()
        assert goes_on.wait(60)
        return decode(*decoded)

    monkeypatch.setattr(answers_module, "view_of", slow)
    with ThreadPoolExecutor(2) as clients:
        try:
            other = clients.submit(
                ask, server, "POST", path, body, PICTURE if path == "/add" else JSON
            )
            assert begun.wait(30)
            passing = clients.submit(search, server, {"words": "a red heart"})
            assert passing.result(20)[0] == 200 and not other.done()
        finally:
            goes_on.set()
        assert other.result()[0] == 200


def test_a_question_too_many_is_refused(
    server: SearchServer, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_in, goes_on = threading.Barrier(MOST_AT_ONCE + 1), threading.Event()

    def slow(content: bytes) -> dict[str, str]:
        all_in.wait(30)
        assert goes_on.wait(60)
        return {}

    monkeypatch.setattr(answers, "add_picture", slow)
    with ThreadPoolExecutor(MOST_AT_ONCE) as clients:
        asked = [
            clients.submit(ask, server, "POST", "/add", b"x", PICTURE) for _ in range(MOST_AT_ONCE)
        ]
        try:
            all_in.wait(30)
            status, found = search(server, {"row": 0})
            assert status == 503 and f"{MOST_AT_ONCE} questions" in found["error"]
            assert ask(server, "GET", "/thumbnail/0")[0] == 200
        finally:
            goes_on.set()
        assert [question.result()[0] for question in asked] == [200] * MOST_AT_ONCE
    assert search(server, {"row": 0})[0] == 200


# ---- Whom it does not answer ---------------------------------------------------------------------


def test_it_listens_on_loopback_alone(server: SearchServer) -> None:
    assert server.is_local and server.url.startswith("http://127.0.0.1:")
    others = {
        entry[4][0]
        for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
        if not str(entry[4][0]).startswith("127.")
    }
    assert server.socket.getsockname()[0] == "127.0.0.1"
    for address in others:
        with (
            pytest.raises(OSError),
            socket.create_connection((address, server.server_address[1]), timeout=5),
        ):
            pass


@pytest.mark.parametrize(
    ("host", "is_own"),
    [
        *[("127.0.0.1", True), ("localhost", True), ("LOCALHOST:8008", True), ("[::1]:80", True)],
        *[("127.8.8.8:1", True), ("evil.example", False), ("evil.example:8008", False)],
        *[("localhost.evil.example", False), ("127.0.0.1.evil.example", False), ("", False)],
        *[("192.168.0.7", False), ("[", False), ("@localhost.evil", False)],
    ],
)
def test_another_host_is_refused(server: SearchServer, host: str, is_own: bool) -> None:
    for method, path in (("GET", "/"), ("GET", "/thumbnail/0"), ("POST", "/search")):
        body = b'{"row": 0}' if method == "POST" else None
        status, _, content = ask(server, method, path, body, JSON | {"Host": host})
        assert status == (200 if is_own else 421)
        assert is_own or "expected a name of this server" in json.loads(content)["error"]


def test_names_of_a_server_that_others_may_reach(answers: Answers) -> None:
    with SearchServer("0.0.0.0", 0) as made:
        assert not made.is_local and socket.gethostname() in made.url
        for name in ("localhost", "10.1.2.3", "::1", socket.gethostname(), "0.0.0.0"):
            assert made.may_be_called(name), name
        assert not made.may_be_called("evil.example") and not made.may_be_called("")


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1"]
)
def test_pages_of_other_sites_get_nothing(server: SearchServer, origin: str) -> None:
    status, found = search(server, {"row": 0}, Origin=origin)
    assert status == 403 and "Origin: expected this page" in found["error"]
    own = f"http://127.0.0.1:{server.server_address[1]}"
    assert search(server, {"row": 0}, Origin=own)[0] == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_bodies_that_other_sites_may_send_unasked_are_refused(
    server: SearchServer, kind: str
) -> None:
    for path, expected in (("/search", JSON_TYPE), ("/add", PICTURE_TYPE)):
        got = error_of(server, "POST", path, b'{"row": 0}', {"Content-Type": kind})
        assert got[0] == 415 and f"expected {expected}" in got[1]


# ---- What it does not answer ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        *("/../../etc/passwd", "/thumbnail/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd"),
        *("/thumbnail/..%2f..%2fetc%2fpasswd", "/picture/1/../../x", "//etc/passwd", "/etc/passwd"),
        *("/thumbnail/-1", "/thumbnail/1e3", "/thumbnail/", "/page.js", "/thumbnail/\u0661", "*"),
        f"/thumbnail/{10**20}",
    ],
)
def test_no_file_is_served_by_its_name(server: SearchServer, path: str) -> None:
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=30) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answer = client.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 404 ") and b"root:" not in answer


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'"row"', b"\xff\xfe", b"[" * 30_000, b'{"row": 1e400}', b"null"],
)
def test_bad_json_is_told(server: SearchServer, body: bytes) -> None:
    for path in ("/search", "/patches"):
        status, message = error_of(server, "POST", path, body, JSON)
        assert status == 400 and message
    assert search(server, {"row": 0})[0] == 200


def test_what_is_no_picture_is_told(server: SearchServer) -> None:
    status, message = error_of(server, "POST", "/add", b"<svg/>", PICTURE)
    assert (status, message) == (400, "not a picture: begins with b'<svg/>'")
    assert error_of(server, "POST", "/add", b"", PICTURE) == (400, "an empty file")


def test_a_large_body_is_refused_by_its_length(
    server: SearchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the client sends all of it before it reads the answer."""
    large = b"x" * (5 << 20)
    status, message = error_of(server, "POST", "/search", large, JSON)
    assert (status, message) == (413, "expected at most 64 KiB, got 5,120 KiB")
    monkeypatch.setattr(server_module, "MOST_PICTURE_BYTES", 4 << 20)
    assert error_of(server, "POST", "/add", large, PICTURE)[0] == 413
    for length in ("9" * 30, "-1", "x", "\u0661"):
        with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=30) as c:
            head = f"POST /add HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
            c.sendall(head.encode())
            assert c.recv(100).split()[1] in (b"411", b"413")


def test_a_refused_body_that_does_not_end_is_read_for_a_bounded_time(
    server: SearchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though each piece of it comes in time, and not at all where a refused request has none."""
    monkeypatch.setattr(server_module, "LINGER_S", 0.3)
    address = ("127.0.0.1", server.server_address[1])
    head = "POST /add HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n"
    with socket.create_connection(address, timeout=30) as client:
        client.sendall(head.encode())
        assert client.recv(1 << 16).split()[1] == b"413"
        with pytest.raises(ConnectionError):
            for _ in range(600):  # a minute
                client.sendall(b"x")
                time.sleep(0.1)
    lingered: list[object] = []
    monkeypatch.setattr(server_module._Handler, "_linger", lingered.append)
    assert ask(server, "GET", "/", None, {"Host": "evil.example"})[0] == 421 and not lingered


def test_a_body_without_its_length_is_refused(server: SearchServer) -> None:
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=30) as client:
        client.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 411 ")


def test_other_methods_are_refused(server: SearchServer) -> None:
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH"):
        assert ask(server, method, "/search")[0] == 501


def test_a_client_that_leaves_stops_nothing(server: SearchServer) -> None:
    for sent in (
        b"",
        b"GET",
        b"POST /add HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
        b"Content-Type: application/octet-stream\r\n\r\nhalf",
    ):
        client = socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=30)
        client.sendall(sent)
        client.close()
    assert search(server, {"row": 0})[0] == 200


def test_an_unforeseen_error_is_told_and_logged(
    server: SearchServer,
    answers: Answers,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(request: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(answers, "search", broken)
    status, found = search(server, {"row": 0})
    assert status == 500 and found["error"] == "RuntimeError: out of luck"
    assert "out of luck" in caplog.text


# ---- Listening -----------------------------------------------------------------------------------


def test_an_address_that_cannot_be_listened_at_is_named(server: SearchServer) -> None:
    port = server.server_address[1]
    with pytest.raises(ValueError, match=rf"--port: {port} of 127.0.0.1 is in use: name another"):
        SearchServer("127.0.0.1", port)
    with pytest.raises(ValueError, match="--host: cannot listen at no.such.host.invalid"):
        SearchServer("no.such.host.invalid", 0)
    with pytest.raises(ValueError, match="--host: cannot listen at 192.0.2.1"):
        SearchServer("192.0.2.1", 0)  # an address of documentation, which no machine has
