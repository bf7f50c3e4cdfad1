"""What runs inside the allocation: ranks, their supervisors, the balancer and the replicas' processes."""

import mii_hpc.rpc  # noqa: F401 (before gRPC is imported)
