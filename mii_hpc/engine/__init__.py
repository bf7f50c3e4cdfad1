"""The engines that a replica can run. Only this package imports torch, transformers and deepspeed."""
