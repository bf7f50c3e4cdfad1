"""`python -m mii_hpc` is `mii-hpc`."""

from mii_hpc.cli.prepare import app

app()
