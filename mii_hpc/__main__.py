"""`python -m mii_hpc` is `mii-hpc`."""

from mii_hpc.cli import app

app()
