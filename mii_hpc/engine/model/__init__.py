"""From a checkpoint to a module that holds one rank's shard."""
