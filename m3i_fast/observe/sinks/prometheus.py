"""Serves the last logged row of a run to Prometheus, with its conventions for names and units."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from m3i_fast.observe.metrics import Ended

LABELS = ("run", "recipe", "rank")

# A group whose members differ from run to run is one metric, with the member as a label.
_FAMILIES = {
    "loss": "term",
    "weight": "term",
    "members": "term",
    "gradient": "term",
    "gradient_cosine": "terms",
    "monitor": "monitor",
}
# Prometheus's base units: our suffix, its suffix, the factor.
_UNITS = (
    ("_gib_s", "_bytes_per_second", 2.0**30),
    ("_gib", "_bytes", 2.0**30),
    ("_mhz", "_hertz", 1e6),
    ("_percent", "_ratio", 1e-2),
    ("tflop_s", "flops_per_second", 1e12),
    ("img_s", "images_per_second", 1.0),
    ("tokens_s", "tokens_per_second", 1.0),
    ("joule_per_image", "joules_per_image", 1.0),
    ("wait_s", "wait_seconds", 1.0),
    ("_w", "_watts", 1.0),
    ("_c", "_celsius", 1.0),
)


def exported(name: str) -> tuple[str, str | None, str, float]:
    """Return the metric, its own label, that label's value and the factor of a logged name."""
    group, _, rest = name.partition("/")
    if group == "time":
        return "m3i_stage_seconds", "stage", rest.removesuffix("_ms"), 1e-3
    if group in _FAMILIES:
        return f"m3i_{group}", _FAMILIES[group], rest, 1.0
    factor = 1.0
    for ours, theirs, scale in _UNITS:
        if rest.endswith(ours):
            rest, factor = rest.removesuffix(ours) + theirs, scale
            break
    return "m3i_" + "".join(c if c.isalnum() else "_" for c in f"{group}_{rest}"), None, "", factor


class PrometheusSink:
    """Serves http://ADDRESS:port/metrics from a thread, with the values of the last row.

    Raises OSError where the port is in use, or the address is not one of this machine.
    """

    def __init__(self, address: str, port: int, *, run: str, recipe: str, rank: int) -> None:
        self._labels = dict(zip(LABELS, (run, recipe, str(rank)), strict=True))
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._of_steps: set[tuple[str, str | None, str]] = set()  # children of the last row's
        try:
            self._server, self._thread = start_http_server(port, address, registry=self._registry)
        except OSError as error:
            raise refused(address, port, error) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Set the gauges to the values of this row, and take away those that it lacks.

        A row of an evaluation, whose names begin with "evaluate/", leaves the others in place, and
        they leave its own.
        """
        rows = {"step": float(step), "logged_timestamp_seconds": time.time()}
        for name, value in rows.items():
            self._set(f"m3i_{name}", None, "", value)
        of_steps = set()
        for name, value in values.items():
            metric, label, member, factor = exported(name)
            self._set(metric, label, member, factor * value)
            if not name.startswith("evaluate/"):
                of_steps.add((metric, label, member))
        if of_steps:
            for metric, label, member in self._of_steps - of_steps:
                self._gauges[metric].remove(
                    *self._labels.values(), *([] if label is None else [member])
                )
            self._of_steps = of_steps

    def close(self, ended: Ended = "complete") -> None:
        """Stop the server and its thread; how the run ended is not served."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _set(self, metric: str, label: str | None, member: str, value: float) -> None:
        if metric not in self._gauges:
            names = LABELS if label is None else (*LABELS, label)
            about = f"{metric} of the steps since the row logged before"
            self._gauges[metric] = Gauge(metric, about, names, registry=self._registry)
        more = {} if label is None else {label: member}
        self._gauges[metric].labels(**self._labels, **more).set(value)


def expect_free(address: str, port: int) -> None:
    """Raise OSError where the port is in use or the address is not one of this machine."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        socket.create_server((address, port), family=family).close()
    except OSError as error:
        raise refused(address, port, error) from error


def refused(address: str, port: int, error: OSError) -> OSError:
    """Return the error for an address and port that cannot be bound, with the flag to change."""
    if error.errno == errno.EADDRINUSE:
        text = (
            f"telemetry.prometheus_port: expected a free port of {address}, got {port}, which is "
            "in use; set --telemetry.prometheus-port to another one, or 0 for none"
        )
    else:
        text = (
            "telemetry.prometheus_address: expected an address of this machine and a port that "
            f"may be opened, got {address} and {port}: {error.strerror}; set "
            "--telemetry.prometheus-address to 127.0.0.1 or an address of this machine, or "
            "--telemetry.prometheus-port to another one"
        )
    return OSError(error.errno, text)
