"""`python -m tests.cluster`: start a cluster to play with, until Ctrl-C."""

import shlex
import signal
import tempfile

from .cluster import Cluster, ClusterError


def main() -> None:
    # Both end it, also when a shell started it in the background, where Ctrl-C's signal is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="mii-cluster-") as folder, Cluster(folder) as cluster:
        print(f"The nodes {', '.join(cluster.nodes)} are up. In another shell, as root:\n")
        print(f"    export SLURM_CONF={shlex.quote(cluster.env['SLURM_CONF'])}")
        print("    sinfo")
        print("    srun --mpi=pmix -N2 -n4 hostname\n")
        print(f"Logs are in {folder}/log. Ctrl-C stops the cluster.", flush=True)
        signal.pause()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
    except ClusterError as error:
        raise SystemExit(str(error)) from None
