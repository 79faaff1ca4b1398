"""The command line: LightningCLI with our keys, refusals, exit statuses and output layout."""

import difflib
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from transformers.utils import logging as transformers_logging

from kto_lightning.callbacks import (
    Checkpoints,
    MetricsStart,
    ProgressBar,
    ProgressLines,
    Summary,
    list_checkpoints,
)
from kto_lightning.checkpoint_io import AtomicCheckpointIO
from kto_lightning.data.datamodule import KTODataModule
from kto_lightning.errors import ConfigError, KTOError
from kto_lightning.export import save_policy
from kto_lightning.metrics_file import MetricsFile
from kto_lightning.module import KTOModule
from kto_lightning.rewards_file import write_rewards

PROG = "python -m kto_lightning"
_UNKNOWN_OPTION = re.compile(
    r"does not accept option '(?P<option>[^']+)'|Key '(?P<key>[^']+)' is not expected"
    r"|[Uu]nrecognized arguments: --(?P<argument>[^\s=]+)"
)
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    # Trainer option: (values that change nothing, what to use instead)
    "gradient_clip_val": ((None,), "--model.gradient_clip_norm"),
    "gradient_clip_algorithm": ((None,), "--model.gradient_clip_norm"),
    "accumulate_grad_batches": (
        (None, 1),
        "--data.batch_size (examples per optimizer step over all devices) and --data.max_tokens "
        "(tokens per forward)",
    ),
}


class Parser(LightningArgumentParser):
    """Answers a wrong key with the nearest right one, in a line instead of all options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        match = _UNKNOWN_OPTION.search(message)
        if match:
            wrong = next(group for group in match.groups() if group).removeprefix("--")
            near = difflib.get_close_matches(wrong, self._known_keys(), n=1, cutoff=0.5)
            if near:
                message = f"{message.rstrip()}. Did you mean '--{near[0]}'?"
        message = message.replace("required: fit.", "required: --")
        print(
            f"error: {message}\nhelp: {self.prog.replace(' [options]', '')} --help", file=sys.stderr
        )
        raise SystemExit(2) from ex

    def _known_keys(self) -> list[str]:
        parsers = [self]
        for action in self._actions:
            parsers.extend(getattr(action, "_name_parser_map", {}).values())
        return [action.dest for parser in parsers for action in parser._actions]


class KTOCLI(LightningCLI):
    """`fit`, `validate` and `predict` on top of Lightning's trainer."""

    def __init__(self, arguments: list[str] | None = None) -> None:
        super().__init__(
            model_class=KTOModule,
            datamodule_class=KTODataModule,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "max_epochs": None,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
                "log_every_n_steps": 1,
            },
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"prog": PROG, "default_env": True, "env_prefix": "KTO"},
            args=arguments,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skipped = {"model", "dataloaders", "datamodule", "weights_only"}
        return {
            "fit": skipped | {"train_dataloaders", "val_dataloaders"},
            "validate": skipped | {"verbose"},
            "predict": skipped | {"return_predictions"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--output_dir",
            type=str,
            default="output",
            help="Where the model, metrics, checkpoints and settings of this run go.",
        )
        parser.add_lightning_class_args(Checkpoints, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Without Lightning's warning about `sys.argv`: `main` is called from Python too."""
        assert args is None or isinstance(args, list)
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Lightning's own lets a checkpoint's settings override the command line's, silently."""

    def before_instantiate_classes(self) -> None:
        config = self.config[str(self.subcommand)]
        trainer = config.trainer
        self._refuse(trainer)
        if trainer.precision is None:
            on_gpu = torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")
            trainer.precision = "bf16-mixed" if on_gpu else "32-true"
        if trainer.max_epochs is None:
            trainer.max_epochs = 1 if trainer.max_steps == -1 else -1
        trainer.default_root_dir = config.output_dir
        config.ckpt_path = self._checkpoint(config.ckpt_path, config.output_dir)

    def _refuse(self, trainer: Any) -> None:
        for name, (harmless, ours) in _REFUSED.items():
            if trainer.get(name) not in harmless:
                raise ConfigError(f"--trainer.{name} does nothing here. Use {ours}.")
        precision = str(trainer.precision)
        if precision.endswith("-true") and precision not in ("32-true", "64-true"):
            raise ConfigError(
                f"--trainer.precision {precision} rounds rotary embeddings and small updates away. "
                "Use bf16-mixed; for a frozen base in bfloat16 add --model.lora and "
                "--model.dtype bfloat16."
            )
        if precision in ("16", "16-mixed"):
            raise ConfigError(
                f"--trainer.precision {precision} scales gradients, which clipping and grad_norm "
                "here do not undo. Use bf16-mixed or 32-true."
            )
        if trainer.fast_dev_run:
            raise ConfigError("--trainer.fast_dev_run skips OUTPUT. Use --trainer.max_steps 1.")

    @staticmethod
    def _checkpoint(path: str | None, output_dir: str) -> str | None:
        if path is None:
            return None
        if path == "last":
            found = list_checkpoints(output_dir)
            if not found:
                raise KTOError(f"--ckpt_path last: there is no checkpoint in {output_dir}.")
            return str(found[-1][1])
        if not Path(path).exists():
            raise KTOError(f"--ckpt_path {path}: there is no such checkpoint.")
        return path

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self.config_init[str(self.subcommand)].trainer
        loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
        own = MetricsFile(trainer.default_root_dir)
        kwargs["logger"] = [own, *(logger for logger in loggers if _is_logger(logger))]
        progress = ProgressBar() if sys.stdout.isatty() else ProgressLines()
        kwargs["callbacks"] = [*(trainer.callbacks or []), MetricsStart(), Summary()]
        if trainer.enable_progress_bar is not False:
            kwargs["callbacks"].append(progress)
        if isinstance(progress, ProgressLines):
            kwargs["enable_progress_bar"] = False
        kwargs["plugins"] = [*(trainer.plugins or []), AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        module, data = self._parts()
        if data.validation_set is not None and module.validated_step != self.trainer.global_step:
            self.trainer.validate(module, datamodule=data, verbose=False)
        if not self.trainer.is_global_zero:
            return
        assert module.policy is not None
        assert data.tokenizer is not None
        output = Path(self.trainer.default_root_dir)
        origin = module.origin()
        save_policy(module.policy, data.tokenizer, output, origin=origin)
        print(f"model     {output / 'model'}")
        print(f"metrics   {output / 'metrics.csv'}")

    def after_validate(self) -> None:
        module, _ = self._parts()
        for name, value in module.latest_metrics.items():
            print(f"{name:24} {value:.6g}")

    def after_predict(self) -> None:
        _, data = self._parts()
        assert data.predict_set is not None
        parts = self.trainer.predict_loop.predictions
        predictions = [prediction for part in parts for prediction in part]
        for path in write_rewards(data.predict_set, predictions, self.trainer.default_root_dir):
            print(f"rewards   {path}")

    def _parts(self) -> tuple[KTOModule, KTODataModule]:
        assert isinstance(self.model, KTOModule)
        assert isinstance(self.datamodule, KTODataModule)
        return self.model, self.datamodule


def _is_logger(logger: Any) -> bool:
    return logger is not None and not isinstance(logger, bool)


def _quieten() -> None:
    """Leave the screen to the summary and the bar: tips and device banners say nothing of a run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(argv: list[str] | None = None) -> int:
    """Run a command. Errors that a person can mend are one message on stderr, not a traceback.

    Returns:
        The exit status: 0; 1 for data or run; 2 for usage.
    """
    _quieten()
    try:
        KTOCLI(argv)
    except (ConfigError, MisconfigurationException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KTOError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 1
    return 0
