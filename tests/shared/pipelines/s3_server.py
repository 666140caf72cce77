"""A real S3 server (moto's) on loopback, with faults put in between it and its clients."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

REFUSED = (
    "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code>"
    "<Message>from the test</Message><RequestId>1</RequestId></Error>"
)
Environ = dict[str, Any]
Fault = Callable[[Environ, Callable[..., Any], Callable[[], list[bytes]]], Iterable[bytes]]


class S3Server:
    """The server's address, the requests it got, and the faults of the next ones."""

    def __init__(self) -> None:
        from moto.moto_server.threaded_moto_server import MotoRequestHandler
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._faults: list[tuple[str, Fault]] = []
        self.requests: Counter[str] = Counter()  # "GET name of object"
        self._ranges: Counter[str] = Counter()  # bytes of ranges sent whole, by path
        self.in_flight = self.most_in_flight = 0
        self._server = make_server(
            "127.0.0.1", 0, self._answer, threaded=True, request_handler=MotoRequestHandler
        )
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()

    def fault(self, name: str, fault: Fault, times: int) -> None:
        """Answer the next requests of objects whose path ends with `name` by a fault."""
        with self._lock:
            self._faults += [(name, fault)] * times

    def sent_bytes(self, name: str) -> int:
        """The bytes of all ranges of objects whose path ends with `name`, without faults."""
        return sum(n for path, n in self._ranges.items() if path.endswith(name))

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()
            self.requests.clear()
            self._ranges.clear()
            self.most_in_flight = 0

    def _answer(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        with self._lock:
            self.requests[f"{environ['REQUEST_METHOD']} {path.rpartition('/')[2]}"] += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            index = next((i for i, (end, _) in enumerate(self._faults) if path.endswith(end)), None)
            fault = None if index is None else self._faults.pop(index)[1]
            if fault is None and "HTTP_RANGE" in environ:
                first, last = environ["HTTP_RANGE"].removeprefix("bytes=").split("-")
                self._ranges[path] += int(last) + 1 - int(first)
        try:
            if fault is None:
                yield from self._app(environ, start_response)
            else:
                yield from fault(
                    environ, start_response, lambda: list(self._app(environ, start_response))
                )
        finally:
            with self._lock:
                self.in_flight -= 1


def refuse(status: str, code: str) -> Fault:
    """Answer with an error as S3 words it."""

    def answer(environ: Environ, start_response: Any, real: Any) -> Iterable[bytes]:
        body = REFUSED.format(code=code).encode()
        start_response(
            status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        )
        return [body]

    return answer


def cut(environ: Environ, start_response: Any, real: Callable[[], list[bytes]]) -> Iterator[bytes]:
    """Close the connection in the middle of the body."""
    body = b"".join(real())
    yield body[: len(body) // 2]
    raise ConnectionAbortedError("cut by the test")


def slow(seconds: float) -> Fault:
    """Send the body in two halves with a pause between them."""

    def answer(environ: Environ, start_response: Any, real: Any) -> Iterator[bytes]:
        body = b"".join(real())
        yield body[: len(body) // 2]
        time.sleep(seconds)
        yield body[len(body) // 2 :]

    return answer


def silent(end: threading.Event) -> Fault:
    """Take a request, and answer nothing until `end` is set."""

    def answer(environ: Environ, start_response: Any, real: Any) -> Iterable[bytes]:
        end.wait()
        raise ConnectionAbortedError("cut by the test")

    return answer


@contextmanager
def s3_environment(address: str) -> Iterator[None]:
    """Set what a user sets for a store that is not Amazon's."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": address,
            "NO_PROXY": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        yield
