"""Checkpoints in the OUTPUT directory of a run: what they hold, which one a run resumes from."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from kto_lightning.batches.objective import Objective
from kto_lightning.errors import ConfigError, KTOError, printable
from kto_lightning.models.following import reference_state
from kto_lightning.models.model_files import resolve_name
from kto_lightning.models.reference import Reference
from kto_lightning.models.settings import ModelSettings
from kto_lightning.models.weights import drop_frozen
from kto_lightning.sharded_checkpoint import is_sharded
from kto_lightning.training.checkpoint_files import problem_of_resuming, read_header
from kto_lightning.training.optimizers import Optimization

_NAME = re.compile(r"step=([0-9]{1,18})\.ckpt")


def normalize_loop_progress(
    fit_loop: dict[str, Any], *, num_epochs: int, num_in_epoch: int
) -> None:
    """Write a run's position in the one form that Lightning 2.6 resumes correctly: within an epoch,
    its steps so far complete; after an epoch's last step, the start of the next epoch.

    Lightning's own counts depend on the hook that saved the checkpoint and on `max_steps`, and a
    run resumed at the end of an epoch repeats that epoch.

    Args:
        fit_loop: the state of the loops in a checkpoint, changed in place.
        num_epochs: completed epochs.
        num_in_epoch: completed steps of the next epoch, fewer than it has.
    """
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    num_steps = batches["total"]["processed"]
    batches["total"] = dict.fromkeys(batches["total"], num_steps)
    batches["current"] = dict.fromkeys(batches["current"], num_in_epoch)
    batches["is_last_batch"] = False
    begun = {"ready": num_epochs + 1, "started": num_epochs + 1}
    for part in ("total", "current"):
        epochs[part] = {**begun, "processed": num_epochs, "completed": num_epochs}


def check_epochs_left(checkpoint: dict[str, Any], max_epochs: int | None) -> None:
    """Refuse to resume a run beyond its last epoch.

    Raises:
        ConfigError: if more epochs are completed than `max_epochs`; None or negative: no limit.
    """
    done = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if max_epochs is not None and 0 <= max_epochs < done:
        raise ConfigError(
            f"{done} epochs are completed in this checkpoint, more than --trainer.max_epochs "
            f"{max_epochs}. Raise it, or resume from an earlier checkpoint."
        )


def add_policy_state(
    checkpoint: dict[str, Any], module: nn.Module, reference: Reference | None, origin: dict
) -> None:
    """Complete a checkpoint: trained weights only, the state of a reference that follows the
    policy, and the policy's origin under `kto` (`policy_origin`)."""
    checkpoint["state_dict"] = drop_frozen(checkpoint["state_dict"], module)
    checkpoint |= reference_state(reference)
    checkpoint["kto"] = origin


def policy_origin(
    models: ModelSettings,
    objective: Objective,
    optimization: Optimization,
    *,
    step: int,
    results: Mapping[str, float],
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    identities: Mapping[str, str],
    changes: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The origin of a policy in plain values, from which `export` builds it again.

    Args:
        step: optimizer steps that are completed.
        results: its latest metrics.
        data: facts about the records, from the data module.
        settings: by option (`run_settings`).
        identities: hashes of the content of the `policy` and `reference` that it started from.
        changes: of the settings, where the run was resumed.
    """
    return {
        "policy": resolve_name(models.policy),
        "reference": resolve_name(models.reference or models.policy),
        **({"in_memory": sorted(models.objects)} if models.objects else {}),
        "beta": objective.beta,
        "loss": objective.loss,
        "dtype": models.dtype,
        "quantization": models.quantization,
        "lora": models.lora.settings() if models.lora is not None else None,
        "follow": asdict(models.follow) if models.follow is not None else None,
        "trust_remote_code": models.trust_remote_code,
        "adapter_base": resolve_name(models.adapter_base) if models.adapter_base else None,
        **asdict(optimization),
        "step": step,
        "results": dict(results),
        "data": dict(data),
        "settings": dict(settings),
        "identities": dict(identities),
        "changes": [dict(change) for change in changes],
    }


def checkpoints_of(output_dir: str | Path) -> Path:
    """The directory of a run's checkpoints."""
    return Path(output_dir) / "checkpoints"


def list_checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run by their names, whole or not, and their steps, oldest first."""
    found = [
        (int(match.group(1)), path)
        for path in checkpoints_of(output_dir).glob("step=*.ckpt")
        if (match := _NAME.fullmatch(path.name))
    ]
    return sorted(found)


def find_checkpoint(path: str, output_dir: str, *, trains: bool) -> Path | None:
    """The checkpoint that `--ckpt_path` names.

    Args:
        path: a checkpoint's path; `last`: the latest whole checkpoint in `output_dir`. One that is
            damaged, or no checkpoint of `fit`, gives way to the one before, with a warning.
        output_dir: of the run that is resumed.
        trains: whether the run is trained further, which needs more than the weights.

    Returns:
        None for `last` if there is none, because the run was killed before it wrote one: a run that
        is trained further then starts over, with a warning.

    Raises:
        KTOError: if the checkpoint given is missing, damaged or not one of `fit`.
    """
    if path == "last":
        return _last_checkpoint(output_dir, trains=trains)
    given = Path(path)
    if not given.exists():
        raise KTOError(f"--ckpt_path {path}: there is no such checkpoint. Check the path.")
    if given.is_dir() and not is_sharded(given):
        raise KTOError(
            f"--ckpt_path {path} is a directory. Give one of its checkpoints, or --ckpt_path last "
            "with the --output_dir of the run."
        )
    header = read_header(given)
    if header is None:
        raise KTOError(
            f"--ckpt_path {path} is not a readable checkpoint, or it is damaged. Give one that "
            "`fit` wrote, or --ckpt_path last."
        )
    problem = problem_of_resuming(header) if trains else None
    if problem is not None:
        raise KTOError(
            f"--ckpt_path {path} cannot be trained further: it has {problem}. Give one that `fit` "
            "wrote to OUTPUT/checkpoints, or start a new run from the model that `export` makes of "
            "it."
        )
    return given


def _last_checkpoint(output_dir: str, *, trains: bool) -> Path | None:
    for _, found in reversed(list_checkpoints(output_dir)):
        header = read_header(found)
        if header is not None and not (trains and problem_of_resuming(header)):
            return found
        _warn(f"{found} is damaged, or not a checkpoint of `fit`; looking for the one before it.")
    if trains:
        _warn(f"{output_dir} has no checkpoint yet: starting over.")
    return None


@rank_zero_only
def _warn(message: str) -> None:
    print(f"warning: {printable(message)}", file=sys.stderr)


def check_not_overwritten(output_dir: str, model: Any) -> None:
    """Refuse a run that would overwrite its own policy or reference with its result.

    Args:
        output_dir: of the run.
        model: the settings under `model`.

    Raises:
        ConfigError: if one of them lies where the run writes its model, or what is no directory
            lies where the run writes one.
    """
    output = Path(output_dir)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output_dir {output_dir} is a file. Name a directory.")
    for name in ("checkpoints", "model", "adapter"):
        path = output / name
        if os.path.lexists(path) and not path.is_dir():
            raise ConfigError(
                f"{path} is not a directory, as the run's {name} will be. Remove it, or choose "
                "another --output_dir."
            )
    written = [(output / name).resolve() for name in ("model", "adapter")]
    for key in ("policy", "reference"):
        name = model[key]
        if name is not None and Path(name).resolve() in written:
            raise ConfigError(
                f"--model.{key} {name} would be overwritten by this run's own model. "
                "Choose another --output_dir."
            )


def check_unused(output_dir: str, checkpoint: Path | None, *, resumes: bool) -> None:
    """Refuse a new run in a directory with the results of an earlier one; resuming is allowed.

    Files of a run that ended before its first step do not count as results.

    Args:
        output_dir: of the run.
        checkpoint: what it resumes from; None: it starts from the beginning.
        resumes: whether `--ckpt_path` was given; with `checkpoint` None it was `last`, and the run
            was killed before its first checkpoint.

    Raises:
        ConfigError: with the results found, and what to do.
    """
    if checkpoint is not None and checkpoint.resolve().parent == _resolved(output_dir):
        return
    found = results_of(output_dir)
    has_model = not {"model", "adapter"}.isdisjoint(found)
    if not found or (resumes and checkpoint is None and not has_model):
        return
    can_resume = not resumes and (list_checkpoints(output_dir) or not has_model)
    resume = "resume it with --ckpt_path last, " if can_resume else ""
    nothing = ", and no checkpoint to resume from" if resumes and checkpoint is None else ""
    raise ConfigError(
        f"--output_dir {output_dir} holds an earlier run: {', '.join(found)}{nothing}. Give "
        f"another --output_dir, {resume}or remove {output_dir} first."
    )


def _resolved(output_dir: str) -> Path:
    return checkpoints_of(output_dir).resolve()


def results_of(output_dir: str | Path) -> list[str]:
    """The results of a run in a directory: rows of metrics, its latest checkpoint, models."""
    output, found = Path(output_dir), []
    if _has_rows(output / "metrics.csv"):
        found.append("metrics.csv")
    found += [f"checkpoints/{path.name}" for _, path in list_checkpoints(output)[-1:]]
    for name in ("model", "adapter"):
        if (output / name).is_dir() and any((output / name).iterdir()):
            found.append(name)
    return found


def _has_rows(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        file.readline()
        return bool(file.readline().strip())
