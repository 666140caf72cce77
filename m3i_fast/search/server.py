"""The server of the page: HTTP on loopback, for the browser of whoever started it.

It serves one page and the answers it asks for, and no file by its name. Requests of other sites are
refused: a Host that is not this machine's (DNS rebinding), an Origin that is not the Host's (other
pages in the same browser), and bodies of a type that other sites may send without asking.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import urlsplit

from m3i_fast.json_files import parse_json
from m3i_fast.report import template
from m3i_fast.search.answers import Answer, Answers, Encoded, Forgotten

logger = logging.getLogger(__name__)

MOST_PICTURE_BYTES = 32 << 20
MOST_JSON_BYTES = 64 << 10
MOST_AT_ONCE = 16  # questions that are being answered; one more gets 503
LINGER_BYTES = 256 << 20  # of a refused body, read so that the browser sees the answer
LINGER_S = 3.0  # in all
JSON_TYPE, PICTURE_TYPE = "application/json", "application/octet-stream"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
PICTURE = re.compile(r"/(thumbnail|picture)/([0-9]{1,15})")
_HERE, _SHARED = Path(__file__).parent, Path(template.__file__).parent


class Wrong(Exception):
    """A request that is answered by an error."""

    def __init__(self, status: HTTPStatus, message: str, *, closes: bool = False) -> None:
        """Make one; closes: whether the connection ends, since its rest is not read."""
        super().__init__(message)
        self.status, self.closes = status, closes


class SearchServer(ThreadingHTTPServer):
    """Serves the page of some answers.

    It listens from its making on, so that a port in use is told before features are computed.
    Each connection has a thread; at most MOST_AT_ONCE of them have a question answered at once.
    """

    daemon_threads = True

    answers: Answers
    page: bytes

    def __init__(self, host: str, port: int) -> None:
        """Listen at an address; ValueError where that cannot be, such as a port in use."""
        self.host = host
        self.places = threading.BoundedSemaphore(MOST_AT_ONCE)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            self.address_family, address = found[0][0], found[0][4]
            super().__init__(address[:2], _Handler)  # type: ignore[arg-type]
        except OSError as error:
            raise ValueError(_why_not(host, port, error)) from error
        self._names = {host.lower(), "localhost"}
        if not self.is_local:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    @property
    def url(self) -> str:
        """Return the address of the page, by this machine's name where it listens everywhere."""
        host, port = str(self.server_address[0]), self.server_address[1]
        if ipaddress.ip_address(host).is_unspecified:
            host = socket.gethostname()
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    @property
    def is_local(self) -> bool:
        """Return whether this machine alone can reach it."""
        return ipaddress.ip_address(str(self.server_address[0])).is_loopback

    def serve(self, answers: Answers) -> None:
        """Serve until `shutdown` or Ctrl-C."""
        self.answers, self.page = answers, render_page(answers.about()).encode()
        self.serve_forever()

    def server_bind(self) -> None:
        """Bind without asking a name server for this machine's name, as HTTPServer does."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def may_be_called(self, name: str) -> bool:
        """Return whether a name in a Host header is this server's.

        An address is, wherever it is listened to, since DNS rebinding needs a name: the attacker's,
        which he has made to lead here. Any port is: a tunnel has another.
        """
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name.lower() in self._names
        return address.is_loopback or not self.is_local

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what went wrong in a connection; one that the browser ended is no error."""
        logger.debug("connection of %s", client_address, exc_info=True)


def _name_in(host: str) -> str:
    """Return the name or address in a Host header, without its port; empty: there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def render_page(about: Answer) -> str:
    """Return the page as HTML, with what it says of model and data."""
    return template.render(
        _HERE / "page.html",
        styles=[_HERE / "page.css"],
        scripts=[_SHARED / "scheme.js", _HERE / "page.js"],
        title="Search your pictures",
        about={**about, "bytes": MOST_PICTURE_BYTES},
    )


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--port: {port} of {host} is in use: name another one, or 0 for any that is free"
    if error.errno == errno.EACCES:
        return f"--port: {port} may not be listened to: name one above 1023, or 0 for any"
    return f"--host: cannot listen at {host}, port {port}: {error.strerror or error}"


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "m3i-fast", ""
    timeout = 60  # seconds for a request to come
    server: SearchServer

    def do_GET(self) -> None:
        """Answer with the page, or with a picture."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Answer a question of the page."""
        self._answer(self._post)

    def _answer(self, make: Callable[[], Encoded]) -> None:
        try:
            self._expect_own()
            self._send(HTTPStatus.OK, make())
        except Wrong as wrong:
            self.close_connection |= wrong.closes
            self._send_error(wrong.status, str(wrong))
            if wrong.closes and self.command == "POST":
                self._linger()
        except Forgotten as error:
            self._send_error(HTTPStatus.NOT_FOUND, str(error))
        except ValueError as error:
            self._send_error(HTTPStatus.BAD_REQUEST, str(error))
        except (ConnectionError, TimeoutError):
            raise  # the browser has gone
        except Exception as error:
            logger.exception("%s %s", self.command, self.path)
            self._send_error(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")

    def _expect_own(self) -> None:
        """Refuse requests that another site has the browser send."""
        host = self.headers.get("Host", "").lower()
        if not self.server.may_be_called(_name_in(host)):
            raise Wrong(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"Host: expected a name of this server, got {host[:100]!r}; open {self.server.url}",
                closes=True,
            )
        origin = self.headers.get("Origin")
        if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            raise Wrong(
                HTTPStatus.FORBIDDEN,
                f"Origin: expected this page, got {origin[:100]!r}",
                closes=True,
            )

    def _get(self) -> Encoded:
        path = urlsplit(self.path).path
        if path == "/":
            return Encoded(self.server.page, "text/html; charset=utf-8")
        found = PICTURE.fullmatch(path)
        if found is None:
            raise Wrong(HTTPStatus.NOT_FOUND, f"there is nothing at {path[:100]!r}")
        answers = self.server.answers
        read = answers.thumbnail if found[1] == "thumbnail" else answers.picture
        return read(int(found[2]))

    def _post(self) -> Encoded:
        answers = self.server.answers
        if self.path == "/add":
            answer = partial(answers.add_picture, self._body(PICTURE_TYPE, MOST_PICTURE_BYTES))
        elif self.path in ("/search", "/patches"):
            content = self._body(JSON_TYPE, MOST_JSON_BYTES)
            call = answers.search if self.path == "/search" else answers.patches
            answer = partial(call, parse_json(content, dict, "body"))
        else:
            raise Wrong(
                HTTPStatus.NOT_FOUND, f"there is nothing at {self.path[:100]!r}", closes=True
            )
        if not self.server.places.acquire(blocking=False):
            raise Wrong(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"{MOST_AT_ONCE} questions are being answered: try again in a moment",
            )
        try:
            return Encoded(json.dumps(answer()).encode(), JSON_TYPE)
        finally:
            self.server.places.release()

    def _body(self, kind: str, most: int) -> bytes:
        """Read the body of a request."""
        length, got = self.headers.get("Content-Length", ""), self.headers.get_content_type()
        if not (length.isascii() and length.isdigit()):
            raise Wrong(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length", closes=True)
        if len(length) > 15 or int(length) > most:
            raise Wrong(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"expected at most {most >> 10:,} KiB, got {int(length[:15]) >> 10:,} KiB",
                closes=True,
            )
        if got != kind:
            raise Wrong(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                f"Content-Type: expected {kind}, got {got[:100]!r}",
                closes=True,
            )
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            raise ConnectionAbortedError("the body ended before its length")
        return content

    # ---- Sending ---------------------------------------------------------------------------------

    def _send(self, status: HTTPStatus, answer: Encoded) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        is_picture = answer.kind.startswith("image/")
        # The address of a picture has the digest of the data in it.
        self.send_header("Cache-Control", "private, max-age=86400" if is_picture else "no-store")
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer.content)

    def _send_error(self, status: HTTPStatus, message: str) -> None:
        self._send(status, Encoded(json.dumps({"error": message}).encode(), JSON_TYPE))

    def _linger(self) -> None:
        """Read what is left of a refused body: closing at once would lose the answer on its way."""
        self.connection.shutdown(socket.SHUT_WR)
        left, end = LINGER_BYTES, time.monotonic() + LINGER_S
        with suppress(TimeoutError):
            while left > 0 and (seconds := end - time.monotonic()) > 0:
                self.connection.settimeout(seconds)
                piece = self.rfile.read1(1 << 16)
                if not piece:
                    break
                left -= len(piece)

    def log_message(self, format: str, *args: Any) -> None:
        """Log a request where debugging is on."""
        logger.debug(f"%s {format}", self.address_string(), *args)
