"""What a machine lacks for a test."""

import os
import shutil

import pytest


def lacking(reason):
    """Skip the test; fail it where `make setup` brings what it needs: as root on Debian, and in CI."""
    brought = os.environ.get("CI") == "true" or (os.geteuid() == 0 and shutil.which("apt-get"))
    (pytest.fail if brought else pytest.skip)(reason)
