"""Model names: a directory, a hub id or an adapter directory, and the files behind one."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from kto_lightning.errors import ModelError
from kto_lightning.models.loading_errors import explain_loading, first_line

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_READ_BY_LIBRARIES = (".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken")
_MAX_TEXT_BYTES = 2**28
"""Of a JSON file or template: libraries read them whole, and real ones have some 30 MB at most."""


def is_adapter(name: str) -> bool:
    """Whether a name is a directory that holds a peft adapter."""
    return is_directory(name) and (Path(name) / "adapter_config.json").exists()


def is_directory(name: str) -> bool:
    """Whether a name is a directory; False for what no path can be, such as a name with a NUL."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):  # too long for a name; an embedded NUL
        return False


def adapter_base(name: str, given: str | None = None) -> str:
    """The name of an adapter directory's base model.

    Args:
        given: the base to use instead of the one that `adapter_config.json` names.

    Raises:
        ModelError: if the adapter's config is damaged or names none, or the base is an adapter.
    """
    path = Path(name) / "adapter_config.json"
    base = given or read_json(path).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ModelError(
            f"{path} names no base_model_name_or_path. Add it, or give --model.adapter_base."
        )
    if is_adapter(base):
        raise ModelError(
            f"{path}: its base {base} is an adapter itself. Merge that adapter into its base, and "
            "give the merged model as --model.adapter_base."
        )
    return base


@contextmanager
def explain_missing_base(name: str, base: str) -> Iterator[None]:
    """Add to the error of a base that is not there which adapter asks for it, and the option that
    gives another."""
    try:
        yield
    except ModelError as error:
        if is_directory(base):
            raise
        raise ModelError(
            f"{Path(name) / 'adapter_config.json'} asks for the base model {base}: {error} "
            "If the base is elsewhere, give --model.adapter_base DIR."
        ) from error


def resolve_name(name: str) -> str:
    """A directory's absolute path, valid in any working directory; a hub id unchanged."""
    return str(Path(name).resolve()) if is_directory(name) else name


def weight_directories(name: str, given_base: str | None = None) -> list[Path]:
    """The directories that hold the weights behind a name: an adapter's, then its base model's.

    A hub id is downloaded to the hub's cache if it is not there yet.

    Args:
        given_base: see `adapter_base`.

    Raises:
        ModelError: if it cannot be downloaded.
    """
    if is_adapter(name):
        base = adapter_base(name, given_base)
        with explain_missing_base(name, base):
            return [Path(name), *weight_directories(base)]
    if is_directory(name):
        return [Path(name)]
    with explain_loading(name, f"the model {name} cannot be downloaded"):
        return [Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))]


VOLATILE = {
    *("transformers_version", "peft_version", "_name_or_path"),
    *("base_model_name_or_path", "revision", "inference_mode"),
}
"""Entries of a config that may change while the model stays the same, as when it is moved."""


def model_identity(name: str, given_base: str | None = None) -> str:
    """A hash of the model behind a name: its weights, configs, and for an adapter its base's.

    Equal for copies in different places. Every byte of the weights is read, once per process as
    long as the file stays as it is.

    Args:
        given_base: see `adapter_base`.

    Returns:
        64 hexadecimal digits.

    Raises:
        ModelError: if the model cannot be downloaded or a file cannot be read.
    """
    digest = sha256()
    for directory in weight_directories(name, given_base):
        check_regular_files(directory)
        for config in ("adapter_config.json", "config.json"):
            if (directory / config).exists():
                settings = read_json(directory / config)
                kept = {key: value for key, value in settings.items() if key not in VOLATILE}
                digest.update(f"{config} {json.dumps(kept, sort_keys=True)}\n".encode())
        for path in sorted(directory.glob("*.safetensors")):
            try:
                status = path.stat()
                content = _file_hash(path.resolve(), status.st_size, status.st_mtime_ns)
            except OSError as error:
                raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
            digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


@cache
def _file_hash(path: Path, size: int, changed_ns: int) -> str:
    """The hash of a file's content; size and time of change tell the cache that it is another."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def check_model_files(name: str) -> None:
    """Check that a name can be a hub id, or is a directory of a model saved as safetensors.

    Raises:
        ModelError: if it is neither.
    """
    if not name:
        raise ModelError("the name of a model is empty. Give a directory or hub id.")
    if not is_directory(name):
        if _HUB_ID.fullmatch(name) and not Path(name).exists():
            return
        if is_file(name):
            raise ModelError(f"{name} is a file. Give a Hugging Face model directory or a hub id.")
        raise ModelError(f"there is no directory {name}, and it cannot be a hub id (owner/name).")
    directory = Path(name)
    if not (directory / "config.json").exists():
        within = directory / "model"  # what a run's output directory holds
        found = f"{within}" if within.is_dir() else "the directory that save_pretrained wrote"
        raise ModelError(
            f"{name} has no config.json, so it is not a Hugging Face model directory. Give {found}."
        )
    check_regular_files(directory)
    if not any(directory.glob("*.safetensors")):
        if any(path for kind in ("*.bin", "*.pt", "*.pth") for path in directory.glob(kind)):
            raise pickled_weights_error(name)
        raise ModelError(f"{name} has no weights (*.safetensors). Copy them there.")
    _check_index(directory / "model.safetensors.index.json")
    if (directory / "generation_config.json").exists():
        read_json(directory / "generation_config.json")  # transformers ignores a damaged one


def is_file(name: str) -> bool:
    """Whether a name is a regular file; False for what no path can be."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False


def check_regular_files(directory: Path) -> None:
    """Check that what libraries open in a directory are files of a size that they can read.

    A pipe would be waited for without end.

    Raises:
        ModelError: with the first entry that is not.
    """
    try:
        entries = sorted(directory.iterdir())
    except OSError as error:
        raise ModelError(f"{directory} cannot be read: {error.strerror}.") from error
    for path in entries:
        if path.suffix not in _READ_BY_LIBRARIES:
            continue
        if not path.is_file():
            raise ModelError(f"{path} is not a file that can be read. Copy the model again.")
        if path.suffix != ".safetensors" and path.stat().st_size > _MAX_TEXT_BYTES:
            raise ModelError(f"{path} is too large for what it should be. Copy the model again.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model.

    Raises:
        ModelError: if it cannot be read, or is not an object.
    """
    if not path.is_file() or path.stat().st_size > _MAX_TEXT_BYTES:
        raise ModelError(f"{path} is not a file that can be read. Copy the model again.")
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}. Copy it again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object. Copy it again.")
    return content


def _check_index(path: Path) -> None:
    """Check that the shards an index names are safetensors files beside it: a name could lead
    anywhere, and a shard of another kind is a pickle."""
    if not path.exists():
        return
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise ModelError(f"{path} has no weight_map. Copy the model again.")
    for shard in dict.fromkeys(map(str, shards.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(
                f"{path} names {shard}, which is not a safetensors file beside it. Save the model "
                "again: model.save_pretrained does."
            )
        if not (path.parent / shard).is_file():
            raise ModelError(f"{path} names {shard}, which is not there. Copy the model again.")


def pickled_weights_error(name: str) -> ModelError:
    """The error for weights that are saved as pickles only."""
    return ModelError(
        f"{name} has its weights as pickles only, which can run code when they are loaded. "
        "Save it again as safetensors: model.save_pretrained does."
    )
