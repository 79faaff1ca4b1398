"""FSDP2, the DDP launcher, and the checks of `--trainer.strategy`."""
