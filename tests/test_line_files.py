"""Text files that flags name: read alike, and refused with flag, file and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3i_fast.line_files import read_lines


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_lines_are_read_with_and_without_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes("puree \u00e9t\u00e9\r\nhot dog\n".encode(encoding))
    assert read_lines(file, "--class-names") == ("puree \u00e9t\u00e9", "hot dog")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nbcd\xe9\n", "a text file in UTF-8, got byte 0xe9 at 5 in .*names.txt; write it"),
        (b"", "text on each line of .*names.txt"),
        (b"cat\n\ndog\n", "text on each line of .*names.txt, no two alike"),
        (b"cat\ncat \n", "text on each line of .*names.txt, no two alike"),
        (None, "a text file in UTF-8, got 'No such file or directory' at .*names.txt"),
    ],
)
def test_what_is_no_list_of_names_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "names.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^--class-names: expected {message}"):
        read_lines(file, "--class-names")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--templates: .* in UTF-8, got 'Is a directory' at"):
        read_lines(tmp_path, "--templates")
