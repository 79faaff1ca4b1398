"""From nothing to an aligned model in minutes: `python -m kto_lightning.demo`."""
