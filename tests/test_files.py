import os

import pytest

from batchnorm.files import whole_file, write_text


def test_text_is_written_whole_and_readable(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("old")
    before = os.umask(0o027)
    try:
        write_text(path, "new: 批量规范化")
    finally:
        os.umask(before)
    assert path.read_text(encoding="utf-8") == "new: 批量规范化"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_failing_block_leaves_the_old_file(tmp_path, failure):
    path = tmp_path / "note.txt"
    path.write_text("old")

    def half():
        with whole_file(path) as file:
            file.write(b"half")
            raise failure("in the middle")

    with pytest.raises(failure, match="in the middle"):
        half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        write_text(tmp_path / "gone" / "note.txt", "text")
