"""What the ranks of a replica share, beside what another user of the host has put in its place."""

import os
import tempfile
from pathlib import Path

import pytest

from mii_hpc.engine.distributed import claimed

pytestmark = pytest.mark.engine


def test_a_shared_buffer_is_made_anew_over_what_a_killed_rank_has_left(tmp_path):
    buffer = tmp_path / "buffer"
    for left in (None, "left"):
        if left:
            buffer.write_text(left)
        with claimed(buffer) as is_ours:
            assert is_ours
            assert (buffer.stat().st_size, buffer.stat().st_mode & 0o777) == (0, 0o600)
        assert not buffer.exists(), "it ends with those who have it open"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_shared_buffer_that_another_user_has_put_there_is_not_used():
    """Who would write what the ranks add up could say what the model answers."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        Path(folder).chmod(0o1777)
        buffer = Path(folder, "buffer")
        buffer.touch()
        buffer.chmod(0o666)
        os.chown(buffer, 65534, 65534)
        os.seteuid(65533)
        try:
            with claimed(buffer) as is_ours:
                assert not is_ours
        finally:
            os.seteuid(0)
        assert buffer.stat().st_uid == 65534
