"""The folder of the demo: its paths, and a marker that protects files of others."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from kto_lightning.errors import ConfigError

MARKER = ".kto_lightning_demo"


@dataclass(kw_only=True, frozen=True, slots=True)
class Folder:
    """The paths of one demo under `root`."""

    root: Path

    @property
    def start(self) -> Path:
        """The half-trained model, a Hugging Face directory."""
        return self.root / "start"

    @property
    def feedback(self) -> Path:
        """The training records."""
        return self.root / "feedback.jsonl"

    @property
    def fit(self) -> Path:
        """OUTPUT of `fit`: `metrics.csv`, `model/` and more."""
        return self.root / "fit"

    @property
    def rewards_png(self) -> Path:
        """The reward curves, if matplotlib is installed."""
        return self.root / "rewards.png"

    @property
    def result(self) -> Path:
        """The shares, intervals and seconds, as JSON."""
        return self.root / "demo.json"

    def claim(self) -> None:
        """Create `root`, or remove the files of an earlier demo from it.

        Raises:
            ConfigError: if it is not a folder, or holds anything and was not made by the demo.
        """
        if self.root.exists() and not self.root.is_dir():
            raise ConfigError(f"--output_dir {self.root} is a file. Choose a folder.")
        marker = self.root / MARKER
        if self.root.is_dir() and any(self.root.iterdir()) and not marker.exists():
            raise ConfigError(
                f"--output_dir {self.root} holds files that the demo did not write, and the demo "
                "overwrites only its own. Choose another folder."
            )
        self.root.mkdir(parents=True, exist_ok=True)
        marker.touch()
        for path in (self.start, self.feedback, self.fit, self.rewards_png, self.result):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
