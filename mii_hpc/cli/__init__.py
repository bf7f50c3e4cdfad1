"""The command line, `mii-hpc`: one file per group of commands."""
