"""The demo: a tiny model, trained and aligned in minutes (`python -m kto_lightning.demo`)."""
