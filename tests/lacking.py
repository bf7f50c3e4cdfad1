"""What a machine lacks for a test."""

import os
import shutil
from typing import NoReturn

import pytest


def lacking(reason: str) -> NoReturn:
    """Skip the test; fail it where `make setup` brings what it needs: as root on Debian, and in CI."""
    brought = os.environ.get("CI") == "true" or (os.geteuid() == 0 and shutil.which("apt-get"))
    if brought:
        pytest.fail(reason)
    pytest.skip(reason)
