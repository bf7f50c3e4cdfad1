"""`python -m mii_hpc` is `mii-hpc`."""

from mii_hpc.cli.main import app

if __name__ == "__main__":
    app()
