import os
import threading

import pytest

from mii_hpc.deployments.files import check_private, private_folder, tail, write_atomically
from mii_hpc.errors import RegistryError
from tests.waiting import PATIENCE


def test_a_file_is_mended_with_its_own_mode(tmp_path):
    file = tmp_path / "file"
    file.touch()
    file.chmod(0o644)
    with pytest.raises(RegistryError, match=f"chmod 600 {file}"):
        check_private(file)
    with pytest.raises(RegistryError, match="cannot be read: No such file"):
        check_private(tmp_path / "absent")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RegistryError, match="cannot be made"):
        private_folder(tmp_path / "file" / "below")


def test_tail_begins_at_a_line(tmp_path):
    file = tmp_path / "log"
    assert tail(file) == ""
    file.write_text("first\nsecond\nthird ü\n")
    assert tail(file) == "first\nsecond\nthird ü\n"
    assert tail(file, 12) == "third ü\n"
    file.write_bytes(b"\xff\xfe\n")
    assert tail(file) == "��\n"


def test_a_reader_sees_all_of_a_file_or_none(tmp_path):
    file = tmp_path / "file"
    write_atomically(file, "a" * 100_000)
    done = threading.Event()

    def rewrite():
        for letter in "abcdefghij" * 6:
            write_atomically(file, letter * 100_000)
        done.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    while not done.is_set():
        text = file.read_text()
        assert len(text) == 100_000
        assert len(set(text)) == 1
    writer.join(PATIENCE)
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_write_leaves_the_old_file_and_nothing_aside(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomically(file, "old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
