import os
import tempfile

import pytest

from mii_hpc.engine.extensions import extensions_folder

pytestmark = pytest.mark.engine


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A folder for temporary files, where others write, too, and this user's home."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp", tmp_path / "home"


def test_it_is_private_and_the_same_for_all_ranks(folders):
    folder = extensions_folder()
    assert folder == extensions_folder() and folder.parent.parent == folders[0]
    assert folder.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("planted", ["folder", "link", "file"])
def test_where_another_has_taken_the_name_all_ranks_build_in_the_home(folders, planted):
    temporary, home = folders
    path, elsewhere = temporary / f"mii_hpc-{os.getuid()}", temporary / "his"
    elsewhere.mkdir(mode=0o777)
    elsewhere.chmod(0o777)
    {"folder": lambda: elsewhere.rename(path), "link": lambda: path.symlink_to(elsewhere), "file": path.touch}[
        planted
    ]()
    folder = extensions_folder()
    assert folder == extensions_folder() and folder.parent.parent == home / ".cache"
    assert folder.parent.stat().st_mode & 0o777 == 0o700


def test_without_a_home_to_write_there_is_a_folder_all_the_same(folders, monkeypatch):
    (folders[0] / f"mii_hpc-{os.getuid()}").touch()
    monkeypatch.setenv("HOME", os.devnull)
    assert extensions_folder().parent.stat().st_mode & 0o777 == 0o700
