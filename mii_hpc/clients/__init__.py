"""Clients of a deployment: for asyncio, and for all else."""

import mii_hpc.rpc  # noqa: F401 (before gRPC is imported)
