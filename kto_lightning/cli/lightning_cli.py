"""`fit`, `validate` and `predict` as a LightningCLI: options, callbacks and output layout."""

import sys
import textwrap
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from kto_lightning.callbacks.checkpoints import Checkpoints, StepSeed
from kto_lightning.callbacks.generations import Generations
from kto_lightning.callbacks.lightning_state import explain_restoring
from kto_lightning.callbacks.others import BeforeOthers, averaging_callback
from kto_lightning.callbacks.preemption import Preemption
from kto_lightning.callbacks.progress import ProgressBar, ProgressLines
from kto_lightning.callbacks.reporting import (
    DataReportFile,
    DiagnosisWarnings,
    MetricsStart,
    Summary,
    WritableRewards,
)
from kto_lightning.callbacks.shared_output import SharedOutput
from kto_lightning.cli.config_file import ConfigFile
from kto_lightning.cli.parser import PROG, Parser, first_cause, offer_as
from kto_lightning.cli.paths import expand_paths
from kto_lightning.cli.refusals import (
    ENVIRONMENT,
    check_callbacks,
    check_environment,
    check_monitors,
    check_trainer_options,
)
from kto_lightning.data.datamodule import KTODataModule
from kto_lightning.data.prepared import PreparedData
from kto_lightning.data.rewards import write_rewards
from kto_lightning.distributed import explain_lost_rank, gathered, wait_for_each_other
from kto_lightning.errors import ConfigError, KTOError, error_message, printable
from kto_lightning.models.export import save_policy
from kto_lightning.module import KTOModule
from kto_lightning.reports.run import write_run_report
from kto_lightning.reports.run.run_file import mark_finished, stops_recorded
from kto_lightning.strategies.checks import check_strategy, is_sharding
from kto_lightning.strategies.heartbeat import watch_hosts
from kto_lightning.strategies.launcher import launch_ranks
from kto_lightning.strategies.protocol import training_strategy
from kto_lightning.training.checkpoint_files import AtomicCheckpointIO
from kto_lightning.training.checkpoints import (
    check_not_overwritten,
    check_unused,
    checkpoints_of,
    find_checkpoint,
)
from kto_lightning.training.metrics_csv import COLUMNS, MONITORABLE_METRICS, MetricsFile
from kto_lightning.training.run_lock import run_lock

offer_as(KTOModule.__init__, policy=str, reference=str | None)
offer_as(
    KTODataModule.__init__,
    train=str | list[str] | None,
    validation=float | str | list[str] | None,
    predict=str | list[str] | None,
    tokenizer=str | None,
)


class KTOCLI(LightningCLI):
    """`fit`, `validate` and `predict` on top of Lightning's trainer."""

    def __init__(self, arguments: list[str]) -> None:
        self._command = arguments[0] if arguments else None
        super().__init__(
            model_class=KTOModule,
            datamodule_class=KTODataModule,
            save_config_callback=ConfigFile,
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
            parser_kwargs={
                "prog": PROG,
                "default_env": True,
                "env_prefix": ENVIRONMENT,
                "allow_abbrev": False,  # else `--trainer.max_step` is taken for `max_steps`
            },
            args=arguments,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:
        """Only the given command where it comes first: each parser takes a tenth of a second."""
        skipped = {"model", "dataloaders", "datamodule", "weights_only"}
        commands = {
            "fit": skipped | {"train_dataloaders", "val_dataloaders"},
            "validate": skipped | {"verbose"},
            "predict": skipped | {"return_predictions"},
        }
        return {k: v for k, v in commands.items() if k == self._command} or commands

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--output_dir",
            type=str | None,
            help="Directory for the run's model, metrics, checkpoints and settings; null: output. "
            "The rewards of predict are written to it; null: beside their records.",
        )
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(Generations, "report")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse without Lightning's warning about `sys.argv`: `main` is also called from Python."""
        assert isinstance(args, list)
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let a checkpoint's settings override the command line's."""

    def before_instantiate_classes(self) -> None:
        config = self.config[str(self.subcommand)]
        expand_paths(config)
        trainer = config.trainer
        check_environment(str(self.subcommand), self._parser(self.subcommand))
        check_trainer_options(trainer, trains=self.subcommand == "fit")
        ranks = {"num_nodes": trainer.num_nodes, "devices": trainer.devices}
        check_strategy(trainer.strategy, config.model, **ranks)
        config.output_dir = "." if config.output_dir == "" else config.output_dir
        self._rewards_dir = config.output_dir
        config.output_dir = config.output_dir or "output"
        if self.subcommand == "fit":
            check_not_overwritten(config.output_dir, config.model)
        else:
            self.save_config_callback = None  # config.yaml stays that of the training
        if trainer.precision is None:
            on_gpu = torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")
            trainer.precision = "bf16-mixed" if on_gpu else "32-true"
        if trainer.max_epochs is None:
            trainer.max_epochs = 1 if trainer.max_steps == -1 else -1

    def instantiate_classes(self) -> None:
        """Turn errors of Lightning and of the classes that it creates into messages."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError) as error:
            cause = first_cause(error)
            message = " ".join(str(cause).split())
            if isinstance(cause, ImportError):  # a package of the class that an option names
                message = f"--trainer.logger or --trainer.callbacks: {message}"
            raise ConfigError(message) from error

    def _set_seed(self) -> None:
        seed = self.config[str(self.subcommand)].seed_everything
        if not 0 <= seed < 2**32:
            raise ConfigError(f"--seed_everything must be from 0 to {2**32 - 1}, got {seed}.")
        super()._set_seed()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self.config_init[str(self.subcommand)].trainer
        loggers = _as_list(trainer.logger)
        output_dir = self.config_init[str(self.subcommand)].output_dir
        kwargs["default_root_dir"] = output_dir
        metrics_file = MetricsFile(output_dir)
        kwargs["logger"] = [metrics_file, *(logger for logger in loggers if _is_logger(logger))]
        progress = ProgressBar() if sys.stdout.isatty() else ProgressLines()
        callbacks = _as_list(trainer.callbacks)
        given = self.config[str(self.subcommand)].trainer  # there a strategy is a name or class
        check_callbacks(callbacks, shards=is_sharding(given.strategy))
        if self.subcommand == "fit":
            validates = self._module_and_data()[1].validation is not None
            check_monitors(callbacks, validates=validates, known=MONITORABLE_METRICS)
        kwargs["callbacks"] = [
            BeforeOthers([one.as_dict() for one in _as_list(given.callbacks)]),
            *callbacks,
            SharedOutput(),
            MetricsStart(),
            StepSeed(),
            DiagnosisWarnings(),
            Preemption(),
            DataReportFile(),  # after Preemption: a signal may come while it is computed
            Summary(),
        ]
        if self.subcommand == "predict":
            kwargs["callbacks"].append(WritableRewards(self._rewards_dir))
        if trainer.enable_progress_bar is not False:
            kwargs["callbacks"].append(progress)
        if isinstance(progress, ProgressLines):
            kwargs["enable_progress_bar"] = False
        kwargs["plugins"] = [*_as_list(trainer.plugins), AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        with ExitStack() as stack:
            names = stack.enter_context(watch_hosts(self.trainer))
            if subcommand == "fit" and self.trainer.is_global_zero:
                output_dir = self.config[subcommand].output_dir
                stack.enter_context(run_lock(output_dir))
                stack.enter_context(stops_recorded(output_dir))
            self._checkpoint = self._find_checkpoint()
            if self._checkpoint is not None:
                explain_restoring(self.trainer, self._checkpoint)
            stack.enter_context(launch_ranks(self.trainer))
            stack.enter_context(explain_lost_rank(names))
            super()._run_subcommand(subcommand)

    def after_fit(self) -> None:
        module, data = self._module_and_data()
        held_out = data.prepared.validation_set is not None
        if held_out and module.validated_step != self.trainer.global_step:
            self.trainer.validate(module, datamodule=data, verbose=False)
        origin = module.origin()
        gather = training_strategy(self.trainer.strategy).gather
        with wait_for_each_other():
            if gather is not None or self.trainer.is_global_zero:
                self._export(origin, gather)

    def _export(
        self, origin: dict[str, Any], gather: Callable[[Tensor], Tensor | None] | None
    ) -> None:
        module, data = self._module_and_data()
        assert module.policy is not None
        assert data.prepared.tokenizer is not None
        output = Path(self.trainer.default_root_dir)
        trusted = module.model_settings.trust_remote_code
        obstacle = save_policy(
            module.policy,
            data.prepared.tokenizer,
            output,
            origin=origin,
            trust_remote_code=trusted,
            gather=gather,
        )
        if not self.trainer.is_global_zero:
            return
        averaging = averaging_callback(self.trainer)
        by = f" (weights averaged by {type(averaging).__name__})" if averaging is not None else ""
        if obstacle is None:
            print(f"model     {printable(str(output / 'model'))}{by}")
        else:
            print(f"adapter   {printable(str(output / 'adapter'))}{by}")
            print(f"no merged model: {obstacle}.")
        print(f"metrics   {printable(str(output / 'metrics.csv'))}")
        _write_report(output)

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint that `--ckpt_path` names; None: the run starts from the beginning."""
        config, trains = self.config[str(self.subcommand)], self.subcommand == "fit"
        output_dir = config.output_dir
        path = config.ckpt_path
        checkpoint = None if path is None else find_checkpoint(path, output_dir, trains=trains)
        if path is not None and checkpoint is None and not trains:
            raise KTOError(
                f"--ckpt_path last: there is no whole checkpoint in {checkpoints_of(output_dir)}. "
                "Check --output_dir, or give a checkpoint file."
            )
        if trains:
            check_unused(output_dir, checkpoint, resumes=path is not None)
        return checkpoint

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["ckpt_path"] = None if self._checkpoint is None else str(self._checkpoint)
        if subcommand == "validate":
            kwargs["verbose"] = False  # `after_validate` prints
        return kwargs

    @rank_zero_only
    def after_validate(self) -> None:
        module, data = self._module_and_data()
        _print_notes(data.prepared)
        metrics = module.published.latest
        if not any(metrics.get(f"val/reward/{side}") for side in ("desirable", "undesirable")):
            _warn_of_identical_reference(module)
        width = max(map(len, metrics), default=0)
        for name in sorted(metrics, key=COLUMNS.index):
            print(f"{name:{width}}  {metrics[name]:.6g}")

    def after_predict(self) -> None:
        module, data = self._module_and_data()
        assert data.prepared.predict_set is not None
        _print_notes(data.prepared)
        batches = self.trainer.predict_loop.predictions
        predictions = gathered([prediction for batch in batches for prediction in batch])
        if not self.trainer.is_global_zero:
            return
        if not any(prediction.reward for prediction in predictions):
            _warn_of_identical_reference(module)
        for path in write_rewards(data.prepared.predict_set, predictions, self._rewards_dir):
            print(f"rewards   {printable(str(path))}")

    def _module_and_data(self) -> tuple[KTOModule, KTODataModule]:
        assert isinstance(self.model, KTOModule)
        assert isinstance(self.datamodule, KTODataModule)
        return self.model, self.datamodule


def _write_report(output: Path) -> None:
    """Write the run report; a failure is a warning, as the run itself has succeeded."""
    try:
        mark_finished(output)
        path, verdict = write_run_report(output)
    except KTOError as error:
        print(f"warning: the report was not written: {error_message(error)}", file=sys.stderr)
        return
    print(f"report    {printable(str(path))}")
    print(textwrap.fill(printable(verdict), width=79))


def _print_notes(data: PreparedData) -> None:
    for reading in data.readings:
        print(f"reading: {printable(reading)}", file=sys.stderr)
    for warning in data.warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)


def _warn_of_identical_reference(module: KTOModule) -> None:
    print(
        f"warning: every reward is 0: the policy {printable(module.model_settings.policy)} and its "
        "reference "
        "are the same model. Give the model that it was trained from as --model.reference, or "
        "trained weights as --ckpt_path.",
        file=sys.stderr,
    )


def _as_list(value: Any) -> list[Any]:
    """An option that takes one value or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_logger(logger: Any) -> bool:
    return logger is not None and not isinstance(logger, bool)
