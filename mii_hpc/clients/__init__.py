"""Clients of a deployment: for asyncio, and for all else."""
