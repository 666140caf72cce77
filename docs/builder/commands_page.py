"""Every command, by what its own --help says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

WIDTH = 100  # columns of the help


def page() -> str:
    """Return the Markdown of all commands, a section each."""
    parts = []
    for command, text in help_texts().items():
        level = "##" if " " not in command else "###"
        parts.append(f"{level} m3i-fast {command}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def help_texts() -> dict[str, str]:
    """Ask the command line, in a process of its own: it imports torch and sets up a log."""
    script = Path(__file__).with_name("help_texts.py")
    environment = os.environ | {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{script.name}: {done.stderr}")
    found: dict[str, str] = json.loads(done.stdout)
    return found
