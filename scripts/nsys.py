"""Unpack NVIDIA's nsys in build/nsys, for the tests that record real runs; needs Debian's apt-get.

    python scripts/nsys.py          runs in `make test-pages`; a second run finds it there

Debian has nsys in its component non-free. Its packages are found through the machine's own sources
with that component added, and unpacked: nothing of the machine is changed, and root is not needed.
Where that is impossible one line says why, and the tests are skipped. Standard library only.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "nsys"
BIN = FOLDER / "bin"
SOURCES = Path("/etc/apt")
PACKAGES = ("nsight-systems", "nsight-systems-target")
# What its importer loads beside libraries that every machine has.
LIBRARIES = ("libssh-4", "libpfm4")


class Unavailable(Exception):
    """The reason why nsys cannot be fetched here, on one line."""


def with_non_free(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield apt's lists of sources in a folder with the component non-free, by a name for each.

    Entries without components, such as folders of the machine's own, are left out.
    """
    for path in (folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))):
        text = path.read_text() if path.is_file() else ""
        if path.suffix == ".sources":
            kept = [s for s in re.split(r"\n\s*\n", text) if re.search(r"(?m)^Components:", s)]
            added = re.sub(r"(?m)^Components:.*$", r"\g<0> non-free", "\n\n".join(kept))
        else:
            kept = re.findall(r"(?m)^deb\s+(?:\[[^]]*\]\s+)?\S+\s+\S*[^/\s]\s+\S.*$", text)
            added = "\n".join(f"{line} non-free" for line in kept)
        if added:
            yield path.name, f"{added}\n"


def run(*command: str, where: Path) -> None:
    """Run a command; Unavailable with the last line of its errors where it fails."""
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise Unavailable(f"{command[0]}: {last}")


def download(where: Path, sources: dict[str, str]) -> None:
    """Download the packages into a folder, through lists of sources of our own."""
    for name in ("sources", "lists/partial", "cache/archives/partial", "debs"):
        (where / name).mkdir(parents=True)
    for name, text in sources.items():
        (where / "sources" / name).write_text(text)
    # A plain apt drops root for downloads, to a user who may not write here.
    settings = {
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": where / "sources",
        "Dir::State::lists": where / "lists",
        "Dir::Cache": where / "cache",
        "APT::Sandbox::User": "",
        "Acquire::Retries": "1",
        "Acquire::http::Timeout": "20",
    }
    options = [f"-o{name}={value}" for name, value in settings.items()]
    run("apt-get", *options, "-qq", "update", where=where)
    run("apt-get", *options, "-qq", "download", *PACKAGES, *LIBRARIES, where=where / "debs")


def unpack(where: Path) -> None:
    """Unpack the packages, and link what finds each other by name where it is installed."""
    for package in sorted((where / "debs").iterdir()):
        run("dpkg", "-x", str(package), str(where), where=where)
    for name in ("sources", "lists", "cache", "debs", "usr/share"):
        shutil.rmtree(where / name)
    (target,) = where.glob("usr/lib/*/nsight-systems/target-linux-x64")
    host = "nsight-systems/host-linux-x64"
    (target.parent / "host-linux-x64").symlink_to(f"../../{host}")
    library = f"../../{target.parts[-3]}/libpfm.so.4"
    (where / "usr" / "lib" / host / "libpfm.so.4").symlink_to(library)
    (where / "bin").mkdir()
    (where / "bin" / "nsys").symlink_to(Path("..") / target.relative_to(where) / "nsys")


def fetch() -> str:
    """Fetch nsys unless it is there; returns its version. Raises Unavailable."""
    if not (BIN / "nsys").exists():
        if platform.machine() != "x86_64":
            raise Unavailable(f"Debian's is for x86_64, this machine is {platform.machine()}")
        if not (shutil.which("apt-get") and shutil.which("dpkg")):
            raise Unavailable("needs apt-get and dpkg")
        sources = dict(with_non_free(SOURCES))
        if not sources:
            raise Unavailable(f"no entry of {SOURCES} has components")
        print(f"nsys: unpacking Debian's {PACKAGES[0]} in {FOLDER.relative_to(ROOT)}", flush=True)
        part = FOLDER.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        download(part, sources)
        unpack(part)
        part.rename(FOLDER)
    shown = subprocess.run([BIN / "nsys", "--version"], capture_output=True, text=True)
    if shown.returncode:
        raise Unavailable(f"{BIN / 'nsys'}: {shown.stderr.strip()}")
    return shown.stdout.strip()


def main() -> None:
    """Fetch nsys, or say on one line why its tests will be skipped."""
    if shutil.which("nsys"):
        return
    try:
        fetch()
    except Unavailable as reason:
        print(f"nsys: not fetched ({reason}); its tests will be skipped")


if __name__ == "__main__":
    main()
