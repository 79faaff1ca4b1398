"""Replicas of hybrid sharding: groups of ranks that hold a whole model each, in shards."""

from kto_lightning.errors import ConfigError, check_count


def check_replicas(replicas: int | None, *, num_nodes: int, num_ranks: int | None = None) -> None:
    """Refuse replicas that the ranks cannot be divided into.

    Args:
        replicas: None: one per machine.
        num_nodes: machines.
        num_ranks: of all machines; None: not known yet.

    Raises:
        ConfigError: with what to use instead.
    """
    check_count("--trainer.strategy.replicas", replicas, or_null=True)
    if replicas is None and num_nodes == 1:
        raise ConfigError(
            "--trainer.strategy fsdp2_hybrid keeps a whole model on every machine, and this run "
            "has one machine. Use fsdp2 (or fsdp2_offload), give --trainer.num_nodes, or divide "
            "the ranks of one machine: --trainer.strategy kto_lightning.strategies.fsdp2.FSDP2 "
            "--trainer.strategy.replicas 2."
        )
    if replicas is not None and num_ranks is not None and num_ranks % replicas:
        raise ConfigError(
            f"--trainer.strategy.replicas {replicas} does not divide the {num_ranks} ranks of this "
            f"run. Use a divisor of {num_ranks}, or 1 to shard over all."
        )
