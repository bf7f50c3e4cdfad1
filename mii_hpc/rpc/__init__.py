"""How processes talk to each other: messages, errors, and TLS channels."""

import os

# gRPC reads these when it is loaded, and never again; so clients and job import this package first.
# Without this one, every connection that is closed for idleness leaves a line on the user's standard error.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# The clients let go of gRPC before a fork by themselves. What gRPC's core would do besides crashes or blocks a child
# that is forked while a call runs.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
