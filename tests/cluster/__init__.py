"""A real Slurm cluster on one machine, for the tests and for people to play with."""
