"""From a configuration to a ready deployment, on the login node. Loads no torch."""
