"""Resuming with other settings: which must stay the same, and which may change from now on."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning import Trainer

from kto_lightning.batches.objective import Objective
from kto_lightning.distributed import from_first_rank, gathered
from kto_lightning.errors import ConfigError
from kto_lightning.models.in_memory import object_identity
from kto_lightning.models.lora import LoRA
from kto_lightning.models.model_files import model_identity
from kto_lightning.models.settings import ModelSettings
from kto_lightning.training.optimizers import Optimization

FIXED = (
    *("model.loss", "model.lora", "model.optimizer", "model.dtype", "model.quantization"),
    *("data.batch_size", "data.shuffle", "data.pairing", "data.pairing_seed", "data.truncation"),
    *("data.streaming", "seed_everything"),
)
"""Settings that must stay the same: another would contradict the optimizer's state, or let the
steps before and after the checkpoint belong to two different runs."""
_FORMER_MODEL = (
    *("beta", "loss", "dtype", "quantization", "lora", "follow"),
    *("optimizer", "learning_rate", "weight_decay", "warmup_ratio", "lr_schedule"),
    "gradient_clip_norm",
)
_FORMER_DATA = ("batch_size", "max_length", "truncation", "pairing")
_ADVICE = "Give the same, or start a new run from the exported model."


_RECORDS = ("columns", "labels", "unlabeled", "chat", "format", "repeated")
"""Settings that may change where the records stay the same. Their digests tell, which a stream has
not: there they must stay."""
_DATA = (*_FORMER_DATA, "shuffle", "pairing_seed", "streaming", *_RECORDS)
_WEIGHTS = ("desirable_weight", "undesirable_weight")


def run_settings(
    models: ModelSettings,
    objective: Objective,
    optimization: Optimization,
    *,
    trainer: Trainer,
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """A run's settings by option, in plain values: those that decide its result, and how long it
    is.

    Args:
        trainer: of the run. Its callbacks may have settings of their own, `resume_settings`.
        data: facts about the records, from the data module.
    """
    settings: dict[str, Any] = {
        "model.loss": objective.loss,
        "model.beta": objective.beta,
        **{f"model.{name}": data[name] for name in _WEIGHTS if name in data},
        **{f"model.{name}": value for name, value in asdict(optimization).items()},
        "model.lora": asdict(models.lora) if models.lora is not None else None,
        "model.follow": asdict(models.follow) if models.follow is not None else None,
        "model.dtype": models.dtype,
        "model.quantization": models.quantization,
        "model.dropout": models.dropout,
        **{f"data.{name}": data[name] for name in _DATA if name in data},
        **({"data.validation": data["held_out"]} if "held_out" in data else {}),
        "seed_everything": int(os.environ.get("PL_GLOBAL_SEED", "0")),
        "trainer.max_steps": _limit(trainer.max_steps),
        "trainer.max_epochs": _limit(trainer.max_epochs),
        "trainer.limit_train_batches": trainer.limit_train_batches,
        "trainer.precision": str(trainer.precision),
    }
    # `Any`: Lightning's callbacks, of which ours have the attribute.
    callbacks: Any = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    for callback in callbacks:
        settings |= getattr(callback, "resume_settings", {})
    return settings


def _limit(value: int | None) -> int | None:
    return None if value is None or value < 0 else value


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A setting that changed when a run was resumed."""

    key: str
    before: Any
    after: Any
    step: int
    """The checkpoint's; the new value holds for the steps after it."""

    def __str__(self) -> str:
        return f"{self.described} from step {self.step} on"

    @property
    def described(self) -> str:
        """The option, its value in the checkpoint, and the one given now."""
        return f"--{self.key} {_shown(self.before)} -> {_shown(self.after)}"


def recorded_settings(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by option, as far as a checkpoint's `kto` has them; older ones have some."""
    settings = origin.get("settings")
    if isinstance(settings, Mapping):
        found, lora = dict(settings), settings.get("model.lora")
        if isinstance(lora, Mapping):  # older ones have fewer of its settings
            found["model.lora"] = asdict(LoRA()) | dict(lora)
        return found
    found = {f"model.{name}": origin[name] for name in _FORMER_MODEL if name in origin}
    data = origin.get("data")
    if isinstance(data, Mapping):
        found |= {f"data.{name}": data[name] for name in _FORMER_DATA if name in data}
        found |= {f"model.{name}": data[name] for name in _WEIGHTS if name in data}
    return found


def compare_settings(then: Mapping[str, Any], now: Mapping[str, Any], *, step: int) -> list[Change]:
    """The settings that changed; one that is not known on either side is not compared.

    Args:
        then: `recorded_settings` of the checkpoint.
        now: the settings of this run, by option.
        step: the checkpoint's.

    Raises:
        ConfigError: if one of `FIXED` is another, with all that are.
    """
    changes = [
        Change(key=key, before=before, after=after, step=step)
        for name in now
        if name in then and _is_plain(then[name])
        for key, before, after in _differences(name, then[name], now[name])
    ]
    fixed = (*FIXED, *(f"data.{name}" for name in _RECORDS if now.get("data.streaming")))
    wrong = [change for change in changes if _is_inside(change.key, fixed)]
    if wrong:
        raise ConfigError(f"{_described(wrong)}. {_ADVICE}")
    return changes


def _is_inside(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _described(wrong: list[Change]) -> str:
    pairs = (f"--{one.key} is {_shown(one.after)} (was {_shown(one.before)})" for one in wrong)
    return f"the run of --ckpt_path cannot be resumed with other settings: {', '.join(pairs)}"


def _differences(name: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """The setting if it differs, or the fields of it that do."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in after:
            if key in before:
                yield from _differences(f"{name}.{key}", before[key], after[key])
    elif _comparable(before) != _comparable(after):
        yield name, before, after


def _is_plain(value: Any) -> bool:
    """Whether a value is one that `run_settings` can have written."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def _comparable(value: Any) -> Any:
    """Lists, of module names, regardless of their order."""
    return sorted(map(str, value)) if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


class Resumption:
    """The content of the models that a run started from, and the settings that changed since.

    Attributes:
        identities: hashes of the content of `policy` and `reference`, in a run that trains.
        changes: of its settings, oldest first, as plain values.
    """

    def __init__(self) -> None:
        self.identities: dict[str, str] = {}
        self.changes: list[dict[str, Any]] = []
        self.latest: list[Change] = []
        """Of this resumption."""
        self._before: Mapping[str, Any] | None = None
        self._objects: dict[str, str] = {}

    def identify_objects(self, models: ModelSettings) -> None:
        """Hash the models in memory, before they are changed; to be called on all ranks.

        Raises:
            ConfigError: if the ranks have others.
        """
        self._objects = {key: object_identity(one) for key, one in models.objects.items()}
        everywhere = gathered([self._objects])
        odd = [key for key in self._objects if len({one[key] for one in everywhere}) > 1]
        if odd:
            raise ConfigError(
                f"the {' and the '.join(odd)} in memory has other weights on some ranks. Load the "
                "same on every rank, or make it after seed_everything with one seed."
            )

    def identify(self, models: ModelSettings) -> None:
        """Hash the models' files; to be called on all ranks, of which the first reads them.

        Raises:
            ModelError: if a file cannot be read.
        """
        names = {"policy": models.policy, "reference": models.reference}

        def hash_files() -> dict[str, str]:
            found = self._objects | {
                key: model_identity(name, models.adapter_base)
                for key, name in names.items()
                if name is not None and key not in self._objects
            }
            return {"reference": found["policy"]} | found

        self.identities = from_first_rank(hash_files)

    def compare(self, checkpoint: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
        """Compare models and settings with a checkpoint's, and keep what changed.

        Args:
            checkpoint: as `fit` writes it.
            now: the origin of the run that resumes from it.

        Returns:
            whether the references are known to be the same.

        Raises:
            ConfigError: if it cannot be resumed by this run.
        """
        then = checkpoint["kto"]
        changes = compare_settings(
            recorded_settings(then), now["settings"], step=checkpoint["global_step"]
        )
        identities = then.get("identities")
        identities = identities if isinstance(identities, Mapping) else {}
        for key in ("policy", "reference"):
            if key in identities and _in_memory(then, key) != _in_memory(now, key):
                raise _other_kind(key, then, now)
            if identities.get(key, self.identities.get(key)) != self.identities.get(key):
                raise _other_model(key, then.get(key), now[key])
        earlier = then.get("changes")
        known = earlier if isinstance(earlier, list) else []
        self.latest, self._before = changes, then
        self.changes = [one for one in known if isinstance(one, dict)]
        self.changes += [asdict(change) for change in changes]
        return "reference" in identities and "reference" in self.identities

    def begin(self) -> None:
        """Let what changed take effect: the run has steps left to take."""
        self._before = None

    def effective(self, origin: dict[str, Any]) -> dict[str, Any]:
        """The origin of the policy, with the settings and results of the checkpoint where no step
        was taken since.

        Args:
            origin: with the settings of this run, and the results that it has measured.
        """
        if self._before is None:
            return origin
        kept = {
            name: value
            for name, value in self._before.items()
            if _is_plain(value)
            and (
                (name in _FORMER_MODEL and f"model.{name}" not in FIXED)
                or (name in ("settings", "data", "results") and isinstance(value, Mapping))
            )
        }
        kept["results"] = {**kept.get("results", {}), **origin["results"]}
        changes = self.changes[: len(self.changes) - len(self.latest)]
        return origin | kept | {"changes": changes}


def _in_memory(origin: Mapping[str, Any], key: str) -> bool:
    """Whether a run's `policy` or `reference` was an object in Python."""
    found = origin.get("in_memory")
    found = found if isinstance(found, list) else []
    same = key == "reference" and origin.get("reference") == origin.get("policy")
    return key in found or (same and "policy" in found)


def _other_kind(key: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> ConfigError:
    was, given = ("in memory" if _in_memory(one, key) else "files" for one in (then, now))
    return ConfigError(
        f"--model.{key} {now[key]} ({given}) cannot be compared with {then.get(key)} ({was}) in "
        "the run of --ckpt_path. Give it as then, as an object or by its name."
    )


def _other_model(key: str, before: Any, after: str) -> ConfigError:
    was = "that it had" if before == after else f"of {before}"
    return ConfigError(
        f"--model.{key} {after} does not hold the weights {was} in the run of --ckpt_path. "
        f"{_ADVICE}"
    )
