"""The balancer: one address for all replicas of a deployment, in a process of its own beside rank 0."""
