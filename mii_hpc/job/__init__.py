"""What runs inside the allocation: ranks, their supervisors, the balancer and the replicas' processes."""
