"""`OUTPUT/config.yaml`: the settings of a run, as `--config` reads them."""

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from kto_lightning.files import write_whole
from kto_lightning.training.checkpoints import checkpoints_of


class ConfigFile(SaveConfigCallback):
    """Writes the file once the run is accepted: its records are read, its model is loaded and its
    checkpoint fits. A command that is refused leaves that of the run before.

    The file says `last` where the run resumes from a checkpoint of its own OUTPUT, which may be
    gone when the file is used.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing: here Lightning's own writes the file."""

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        output = Path(trainer.default_root_dir)
        config: Any = self.config.clone()
        if config.ckpt_path is not None:
            parent = Path(config.ckpt_path).resolve().parent
            if parent == checkpoints_of(output).resolve():
                config.ckpt_path = "last"
        text = self.parser.dump(config, skip_none=False)
        write_whole(output / self.config_filename, text, what="the settings")
