"""The page of `make gpu`: of each step what it answers, what was expected, and what it got.

Needs jinja2, which torch brings; the package is not built yet when the first page is written.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.gpu.steps import ROOT, Result, Step

HERE = Path(__file__).parent
REPORT = ROOT / "m3i_fast" / "report"
SHOWN_LINES = 40


def write_page(out: Path, *, header: str, steps: Sequence[Step], results: Sequence[Result]) -> Path:
    """Write index.html into the folder, of all steps that ran or will run, and return it."""
    render = runpy.run_path(str(REPORT / "template.py"))["render"]
    by_name = {step.name: step for step in steps}
    done = {result.name for result in results}
    waiting = [step for step in steps if step.name not in done]
    text = render(
        HERE / "page.html",
        styles=[HERE / "page.css"],
        scripts=[REPORT / "scheme.js"],
        title="First hour on a card",
        summary=[header, _verdict(results, waiting)],
        tiles=_tiles(results),
        steps=[_shown(out, by_name.get(r.name), r) for r in results]
        + [_waiting(step) for step in waiting],
        machine=_machine(out),
    )
    beside = out / "index.html.new"
    beside.write_text(text, encoding="utf-8")
    beside.replace(out / "index.html")
    return out / "index.html"


def _verdict(results: Sequence[Result], waiting: Sequence[Step]) -> str:
    failed = [result.name for result in results if result.has_failed]
    surprising = [result.name for result in results if not result.has_failed and result.surprises]
    words = []
    if failed:
        words.append(f"Failed: {', '.join(failed)}.")
    if surprising:
        words.append(f"Not as expected: {', '.join(surprising)}.")
    if not words:
        words.append("All that ran is as expected.")
    if waiting:
        words.append(f"Still to come: {', '.join(step.name for step in waiting)}.")
    return " ".join(words)


def _tiles(results: Sequence[Result]) -> list[dict[str, str]]:
    checks = [check for result in results for check in result.checks]
    holding = sum(check.holds is True for check in checks)
    judged = sum(check.holds is not None for check in checks)
    passed = sum(result.has_passed for result in results)
    ran = sum(result.has_passed or result.has_failed for result in results)
    left = [result.name for result in results if not result.has_passed and not result.has_failed]
    minutes = sum(result.seconds for result in results) / 60
    return [
        {"label": "steps ran to their end", "value": f"{passed} of {ran}", "detail": ""},
        {"label": "checks as expected", "value": f"{holding} of {judged}", "detail": ""},
        {"label": "steps left out", "value": str(len(left)), "detail": ", ".join(left)},
        {"label": "minutes", "value": f"{minutes:.1f}", "detail": "of all steps"},
    ]


def _shown(out: Path, step: Step | None, result: Result) -> dict[str, Any]:
    kind = "bad" if result.has_failed or result.surprises else "good" if result.has_passed else ""
    kept = out / f"{result.name}.txt"
    output = ""
    if kept.is_file() and (result.has_failed or not (step and step.quiet)):
        output = "\n".join(kept.read_text(errors="replace").splitlines()[-SHOWN_LINES:])
    return {
        "name": result.name,
        "outcome": result.outcome,
        "kind": kind,
        "answers": step.answers if step else "",
        "expects": step.expects if step else "",
        "seconds": f"{result.seconds:.0f}" if result.seconds >= 1 else "",
        "earlier": result.is_earlier,
        "checks": result.checks,
        "output": output,
    }


def _waiting(step: Step) -> dict[str, Any]:
    return {
        "name": step.name,
        "outcome": "still to come",
        "kind": "",
        "answers": step.answers,
        "expects": step.expects,
        "seconds": "",
        "earlier": False,
        "checks": (),
        "output": "",
    }


def _machine(out: Path) -> list[tuple[str, str]]:
    path = out / "env.json"
    if not path.is_file():
        return []
    facts = json.loads(path.read_text())
    inventory = facts.pop("inventory")
    return [(name, str(value)) for name, value in {**facts, **inventory}.items()]
