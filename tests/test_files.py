import errno
import os
import stat
import time

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


@pytest.mark.skipif(os.name != "posix", reason="folders cannot be opened elsewhere")
def test_the_file_is_on_the_disk_before_it_has_its_name_and_the_name_at_the_end(
    tmp_path, monkeypatch
):
    path, steps = tmp_path / "note.txt", []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        found = os.fstat(descriptor)
        steps.append("folder" if stat.S_ISDIR(found.st_mode) else f"{found.st_size} bytes")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("name"), replace(*names)))
    write_text(path, "whole")
    assert steps == ["5 bytes", "name", "folder"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_put_on_the_disk(tmp_path, monkeypatch, code):
    path, fsync = tmp_path / "note.txt", os.fsync

    def fail_on_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_on_folders)
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            write_text(path, "new")
    else:
        write_text(path, "new")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "new"


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "note.txt"
    path.write_text("old")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_small_file_takes_no_time(tmp_path):
    started = time.perf_counter()
    for _ in range(5):
        write_text(tmp_path / "note.txt", "text")
    assert time.perf_counter() - started < 2
