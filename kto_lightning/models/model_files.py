"""Model names: a directory, a hub id or an adapter directory, and the files behind one."""

import json
import re
from functools import cache
from hashlib import file_digest, sha256
from pathlib import Path

from huggingface_hub import snapshot_download
from peft import PeftConfig

from kto_lightning.errors import ModelError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def is_adapter(name: str) -> bool:
    """Whether a name is a directory that holds a peft adapter."""
    return (Path(name) / "adapter_config.json").is_file()


def adapter_base(name: str) -> str:
    """The name of an adapter directory's base model.

    Raises:
        ModelError: if the adapter's config is damaged or names none.
    """
    try:
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ModelError(f"{name}: adapter_config.json cannot be read: {error}") from error
    if not base:
        raise ModelError(f"{name}: adapter_config.json names no base_model_name_or_path. Add it.")
    return base


def resolve_name(name: str) -> str:
    """A directory's absolute path, valid in any working directory; a hub id unchanged."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def weight_directories(name: str) -> list[Path]:
    """The directories that hold the weights behind a name: an adapter's, then its base model's.

    A hub id is downloaded to the hub's cache if it is not there yet.

    Raises:
        ModelError: if it cannot be downloaded.
    """
    if is_adapter(name):
        return [Path(name), *weight_directories(adapter_base(name))]
    if Path(name).is_dir():
        return [Path(name)]
    try:
        return [Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))]
    except (OSError, ValueError) as error:
        raise ModelError(f"the model {name} cannot be downloaded: {first_line(error)}") from error


_VOLATILE = {
    *("transformers_version", "peft_version", "_name_or_path"),
    *("base_model_name_or_path", "revision", "inference_mode"),
}
"""Entries of a config that may change while the model stays the same, as when it is moved."""


def model_identity(name: str) -> str:
    """A hash of the model behind a name: its weights, configs, and for an adapter its base's.

    Equal for copies in different places. Every byte of the weights is read, once per process as
    long as the file stays as it is.

    Returns:
        64 hexadecimal digits.

    Raises:
        ModelError: if the model cannot be downloaded or a file cannot be read.
    """
    digest = sha256()
    for directory in weight_directories(name):
        paths = [directory / file for file in ("adapter_config.json", "config.json")]
        for path in sorted([*filter(Path.exists, paths), *directory.glob("*.safetensors")]):
            if not path.is_file():  # a pipe would never end
                raise ModelError(f"{path} is not a regular file. Copy the model again.")
            try:
                digest.update(f"{path.name} {_content_digest(path)}\n".encode())
            except (OSError, ValueError, RecursionError) as error:
                raise ModelError(f"{path} cannot be read: {first_line(error)}") from error
    return digest.hexdigest()


def _content_digest(path: Path) -> str:
    if path.suffix == ".json":
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict):
            config = {key: value for key, value in config.items() if key not in _VOLATILE}
        return sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    status = path.stat()
    return _weights_digest(path.resolve(), status.st_size, status.st_mtime_ns)


@cache
def _weights_digest(path: Path, size: int, changed_ns: int) -> str:
    """The hash of a file's content; size and time of change tell the cache that it is another."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def check_model_files(name: str) -> None:
    """Check that a name can be a hub id, or is a directory of a model saved as safetensors.

    Raises:
        ModelError: if it is neither.
    """
    directory = Path(name)
    if not name:
        raise ModelError("the name of a model is empty. Give a directory or hub id.")
    if not directory.exists() and not _HUB_ID.fullmatch(name):
        raise ModelError(f"there is no directory {name}, and it cannot be a hub id (owner/name).")
    if directory.is_dir() and not (directory / "config.json").is_file():
        within = directory / "model"  # what a run's output directory holds
        found = f"{within}" if within.is_dir() else "the directory that save_pretrained wrote"
        raise ModelError(
            f"{name} has no config.json, so it is not a Hugging Face model directory. Give {found}."
        )
    if directory.is_dir() and not any(directory.glob("*.safetensors")):
        if any(directory.glob("*.bin")):
            raise pickled_weights_error(name)
        raise ModelError(f"{name} has no weights (*.safetensors). Copy them there.")
    if directory.is_file():
        raise ModelError(f"{name} is a file. Give a Hugging Face model directory or a hub id.")


def pickled_weights_error(name: str) -> ModelError:
    """The error for weights that are saved as pickles only."""
    return ModelError(
        f"{name} has its weights as pickles only, which can run code when they are loaded. "
        "Save it again as safetensors: model.save_pretrained does."
    )


def reason_of_failure(name: str, error: BaseException) -> str:
    """Why loading a model or tokenizer failed, in one sentence, with what to do where it is known.

    Args:
        name: what was to be loaded.
        error: what transformers raised.
    """
    if "trust_remote_code" in str(error):
        return (
            "it comes with code of its own, which has not been run. Read that code; if you trust "
            "it, give --model.trust_remote_code true."
        )
    if Path(name).exists() or "connect" not in str(error):
        return first_line(error)
    return f"there is no directory {name} here, and the hub cannot be reached. Check the path."


def first_line(error: BaseException) -> str:
    """An error's message without the lines after its first; its class where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
