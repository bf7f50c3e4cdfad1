"""What signals mean to a rank. Slurm may deliver one to every process of a job step, so each has one meaning.

    SIGTERM SIGINT SIGHUP SIGQUIT      the deployment ends in order: requests that run get a few seconds, the name is
    SIGUSR1 SIGUSR2 SIGXCPU            free, every rank exits with status 0 (scancel, preemption, requeue, the walltime)
    SIGSTOP SIGTSTP SIGCONT            the job is suspended, and goes on
    SIGKILL                            the process is lost; the others see to it

Children of a rank heed none of these but SIGKILL and SIGSTOP; the rank ends them by a signal that nobody else sends.
"""

from __future__ import annotations

import signal

DRAIN = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
"""End the deployment in order."""
END_CHILD = signal.SIGRTMIN
"""A rank ends its children by this."""
