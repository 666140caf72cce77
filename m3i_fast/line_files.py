"""Text files with a name or a prompt on each line, as flags name them."""

from __future__ import annotations

from pathlib import Path


def read_lines(file: Path, flag: str) -> tuple[str, ...]:
    """Read the lines of a text file in UTF-8, less the byte order mark that some editors write.

    Raises ValueError, which names flag and file, where it cannot be read or is not UTF-8, where a
    line has no text, and where two are alike.
    """
    expected = f"{flag}: expected a text file in UTF-8"
    try:
        lines = tuple(file.read_bytes().decode("utf-8-sig").splitlines())
    except OSError as error:
        raise ValueError(f"{expected}, got {error.strerror!r} at {file}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{expected}, got byte 0x{error.object[error.start]:02x} at {error.start} in {file}; "
            "write it again as UTF-8 (iconv -f LATIN1 -t UTF-8)"
        ) from None
    texts = [line.strip() for line in lines]
    if not texts or not all(texts) or len(set(texts)) < len(texts):
        raise ValueError(f"{flag}: expected text on each line of {file}, no two alike")
    return lines
