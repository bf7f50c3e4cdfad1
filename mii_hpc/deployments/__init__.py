"""What lies on the shared filesystem: the registry, run directories, credentials, and what is shared."""
