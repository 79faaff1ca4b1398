"""`python -m kto_lightning export CHECKPOINT DIR`: a checkpoint to a Hugging Face directory.

Heavy modules are imported inside functions, so that help and usage errors appear at once.
"""

import argparse
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from kto_lightning.cli.arguments import PrintableParser
from kto_lightning.cli.paths import expanded_path
from kto_lightning.errors import (
    ConfigError,
    KTOError,
    ModelError,
    error_message,
    os_error_message,
    printable,
)


def main(argv: list[str]) -> int:
    """Run `export` with the arguments after its name.

    Returns:
        The exit status: 0; 1 if the checkpoint or its model cannot be read, or DIR cannot be
        written; 2 for wrong usage.
    """
    try:
        arguments = _parse(argv)
    except SystemExit as end:  # argparse has printed its help or its usage error
        return int(end.code or 0)
    try:
        _export(arguments)
    except KTOError as error:
        print(f"error: {error_message(error)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        print(f"error: {os_error_message(error)}", file=sys.stderr)
        return 1
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = PrintableParser(
        prog="python -m kto_lightning export",
        description="Write the trained weights of a checkpoint as a Hugging Face directory: the "
        "model, or after training with LoRA the adapter.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=expanded_path,
        help="such as OUTPUT/checkpoints/step=N.ckpt",
    )
    parser.add_argument(
        "directory", metavar="DIR", type=expanded_path, help="where to write; must be new or empty"
    )
    parser.add_argument(
        "--merge", action="store_true", help="write the whole model with its adapter merged"
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="allow code that comes with the policy to run, whatever the checkpoint says",
    )
    parser.add_argument(
        "--adapter_base",
        type=os.path.expanduser,
        metavar="DIR",
        help="the base model, where the policy was an adapter whose base has moved",
    )
    arguments = parser.parse_args(argv)
    directory = arguments.directory
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        parser.error(f"{directory} exists already. Name a new directory.")
    return arguments


def _export(arguments: argparse.Namespace) -> None:
    from transformers.utils import logging

    from kto_lightning.models.export import has_adapter, save_weights
    from kto_lightning.models.from_checkpoint import load_policy_from_checkpoint, read_values
    from kto_lightning.models.merging import merge_obstacle

    checkpoint_path, directory = arguments.checkpoint, arguments.directory
    checkpoint = _load_checkpoint(checkpoint_path)
    origin = checkpoint["kto"]
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        policy = load_policy_from_checkpoint(
            checkpoint,
            trust_remote_code=arguments.trust_remote_code,
            adapter_base=arguments.adapter_base,
            merges=arguments.merge,
        )
        tokenizer = _load_tokenizer(origin, arguments)
    except ModelError as error:
        raise ModelError(f"{checkpoint_path}: {error}") from error
    if arguments.merge:
        if not has_adapter(policy):
            raise ConfigError(
                f"--merge: {checkpoint_path} holds a full model without an adapter. Omit --merge."
            )
        obstacle = merge_obstacle(policy.model)
        if obstacle is not None:
            raise ConfigError(
                f"--merge: no merged model would equal the adapter: {obstacle}. Omit --merge to "
                "write the adapter."
            )
    read = partial(read_values, checkpoint)
    save_weights(policy, tokenizer, directory, origin=origin, merges=arguments.merge, read=read)
    kind = "adapter" if has_adapter(policy) and not arguments.merge else "model"
    print(f"{kind:9} {printable(str(directory))}")


def _load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint whose tensors are on disk: those of a file are mapped into memory, those of a
    directory on the device `meta`."""
    from kto_lightning.models.origin import check_origin
    from kto_lightning.sharded_checkpoint import is_sharded, read_header, verify_directory
    from kto_lightning.training.checkpoint_files import AtomicCheckpointIO

    if not path.exists():
        raise KTOError(f"there is no checkpoint {path}. Check the path.")
    if path.is_dir() and not is_sharded(path):
        raise KTOError(
            f"{path} is a directory without a checkpoint. Give a checkpoint that `fit` wrote."
        )
    if path.is_dir():
        verify_directory(path)
        checkpoint: dict[str, Any] = read_header(path)
    else:
        checkpoint = AtomicCheckpointIO().map_checkpoint(path)
    check_origin(checkpoint, str(path))
    return checkpoint


def _load_tokenizer(origin: dict[str, Any], arguments: argparse.Namespace) -> Any:
    from kto_lightning.models.tokenizer import load_tokenizer

    name = origin["data"]["tokenizer"] or origin["policy"]
    tokenizer = load_tokenizer(
        name,
        trust_remote_code=arguments.trust_remote_code,
        given_base=arguments.adapter_base or origin.get("adapter_base"),
    )
    if origin["data"]["chat_template"]:
        tokenizer.chat_template = origin["data"]["chat_template"]
    return tokenizer
