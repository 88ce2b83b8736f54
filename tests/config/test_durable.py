from __future__ import annotations

import os
import threading

import pytest

from rayfm.config import CapacityError, LabelError
from rayfm.config.durable import TEMPORARY, sync_dir, sync_file, sync_open, write_durably, write_whole


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the file system, in order: (call, the name that it is about)."""
    made: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def named(descriptor: int) -> None:
        made.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def moved(source, target) -> None:
        made.append(("replace", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", named)
    monkeypatch.setattr(os, "replace", moved)
    return made


def test_a_durable_file_is_synced_before_its_name_and_the_folder_after(tmp_path, calls):
    path = tmp_path / "folder" / "a.bin"
    assert write_durably(path, lambda file: file.write(b"abc"), modified=1000.0) == 3
    assert path.read_bytes() == b"abc"
    assert path.stat().st_mtime == 1000.0
    (first, unfinished), *rest = calls
    assert first == "fsync"
    assert unfinished.startswith(TEMPORARY)
    assert rest == [("replace", "a.bin"), ("fsync", "folder")]
    assert os.listdir(path.parent) == ["a.bin"]


def test_a_whole_file_is_renamed_and_not_synced(tmp_path, calls):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    assert write_whole(path, lambda file: file.write(b"newer")) == 5
    assert path.read_bytes() == b"newer"
    assert calls == [("replace", "a.bin")]


@pytest.mark.parametrize("write", [write_durably, write_whole])
def test_what_fails_halfway_leaves_the_old_file_and_nothing_else(tmp_path, write):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fill(file) -> None:
        file.write(b"half")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write(path, fill)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("write", [write_durably, write_whole])
def test_a_full_disk_is_the_error_that_the_caller_names(tmp_path, write):
    def full(file) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CapacityError, match=r"a\.bin: cannot write \(No space left on device\); free space"):
        write(tmp_path / "a.bin", full)
    with pytest.raises(LabelError, match=r"a\.bin: cannot write"):
        write(tmp_path / "a.bin", full, error=LabelError)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_is_the_same_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CapacityError, match="cannot write"):
        write_durably(tmp_path / "file" / "a.bin", lambda file: None)


def test_the_only_writer_clears_away_what_a_killed_one_left(tmp_path):
    path, left = tmp_path / "a.bin", tmp_path / ".a.bin.tmp"
    left.write_bytes(b"half of what a killed process wrote")
    write_durably(path, lambda file: file.write(b"abc"), only_writer=True)
    assert path.read_bytes() == b"abc"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_writers_of_one_file_do_not_mix(tmp_path):
    path, meet = tmp_path / "a.bin", threading.Barrier(4)

    def write(letter: bytes) -> None:
        def fill(file) -> None:
            file.write(letter * 500)
            meet.wait()
            file.write(letter * 500)

        write_whole(path, fill)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in [letter * 1000 for letter in (b"a", b"b", b"c", b"d")]
    assert os.listdir(tmp_path) == ["a.bin"]


def test_what_others_wrote_is_synced_with_its_folder(tmp_path, calls):
    path = tmp_path / "a.bin"
    with path.open("wb") as file:
        file.write(b"abc")
        sync_open(file)
        assert path.read_bytes() == b"abc"  # flushed
    sync_file(path)
    sync_dir(tmp_path)
    assert calls == [("fsync", "a.bin"), ("fsync", "a.bin"), ("fsync", tmp_path.name), ("fsync", tmp_path.name)]
