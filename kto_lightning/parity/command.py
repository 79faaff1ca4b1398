"""`python -m kto_lightning parity`: TRL's `KTOTrainer` and `fit` compared step by step.

Heavy modules are imported inside functions, so that help and usage errors are fast.
"""

import argparse
import json
import os
import re
import sys
from importlib.util import find_spec
from typing import Any, get_args

from kto_lightning.batches.objective import LossName
from kto_lightning.errors import ConfigError, KTOError, error_message

_WEIGHTS = ("desirable_weight", "undesirable_weight")


def main(argv: list[str]) -> int:
    """Run `parity` with the arguments after its name.

    Returns:
        The exit status: 0 if both agree; 1 if they differ or a side cannot be run; 2 for wrong
        usage, or without the package trl.
    """
    try:
        arguments, options = _parse(argv)
    except SystemExit as end:  # argparse has printed help or a usage error
        return int(end.code or 0)
    try:
        return 0 if _parity(arguments, options) else 1
    except KTOError as error:
        message = re.sub(r"--data\.(chat_template|max_length)\b", r"--\1", error_message(error))
        print(f"error: {message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m kto_lightning parity",
        usage="%(prog)s --model DIR --data FILE [options] [-- KEYS OF fit]",
        description="Train with TRL's KTOTrainer and with `fit` on the same records, from the same "
        "weights, in float32 on the CPU, and compare loss, z0, log-probs, rewards, gradient norm "
        "and weights. Both train in file order with TRL's pairing. Exit status 0: they agree; 1: "
        "they differ.",
        epilog="Arguments after `--` are for `fit` only: `-- --data.max_tokens 512` must change "
        "nothing, `-- --data.pairing distinct_prompts` shows the effect of another pairing.",
        allow_abbrev=False,
    )
    required = parser.add_argument_group("required")
    required.add_argument(
        "--model",
        required=True,
        type=os.path.expanduser,
        metavar="DIR",
        help="model or adapter directory, or hub id",
    )
    required.add_argument("--data", required=True, metavar="FILE", help="records, as for `fit`")
    _add_settings(parser)
    parser.add_argument(
        "--reference",
        type=os.path.expanduser,
        metavar="DIR",
        help="another model as the reference",
    )
    parser.add_argument(
        "--lora", type=int, metavar="R", help="train a new LoRA adapter of this rank, alpha 2R"
    )
    parser.add_argument(
        "--chat_template",
        type=os.path.expanduser,
        metavar="FILE_OR_NAME",
        help="a Jinja chat template, or a tokenizer that has one, instead of the tokenizer's",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    given, options = argv, []
    if "--" in argv:
        at = argv.index("--")
        given, options = argv[:at], argv[at + 1 :]
    arguments = parser.parse_args(given)
    _check_minimums(parser, arguments)
    return arguments, options


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Options for `trace.Settings`, with the names, meanings and defaults of the keys of `fit`."""
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="(default: 20)")
    parser.add_argument(
        "--batch_size", type=int, default=8, metavar="N", help="examples per step (default: 8)"
    )
    parser.add_argument(
        "--max_length", type=int, default=1024, metavar="N", help="in tokens (default: 1024)"
    )
    parser.add_argument("--loss", choices=get_args(LossName), default="kto")
    parser.add_argument("--beta", type=float, default=0.1, metavar="F", help="(default: 0.1)")
    for name in _WEIGHTS:
        parser.add_argument(
            f"--{name}", type=_weight, metavar="auto|F", help="(default: auto, of all labels)"
        )
    parser.add_argument(
        "--learning_rate", type=float, default=1e-6, metavar="F", help="(default: 1e-6)"
    )
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument(
        "--lr_schedule", choices=["constant", "linear", "cosine"], default="constant"
    )
    parser.add_argument("--warmup_ratio", type=float, default=0.0, metavar="F")
    parser.add_argument("--weight_decay", type=float, default=0.0, metavar="F")
    parser.add_argument(
        "--gradient_clip_norm", type=float, metavar="F", help="(default: no clipping)"
    )


def _weight(text: str) -> float | None:
    return None if text == "auto" else float(text)


def _check_minimums(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    at_least = {"steps": 1, "batch_size": 2, "max_length": 2, "lora": 1}
    for name, least in at_least.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            reason = ": TRL does not accept a batch of one" if name == "batch_size" else ""
            parser.error(f"--{name} must be at least {least}, got {value}{reason}")


def _parity(arguments: argparse.Namespace, options: list[str]) -> bool:
    if find_spec("trl") is None:
        raise ConfigError(
            "parity compares with TRL, which is not installed. "
            "`pip install 'kto-lightning[trl]'`, or install trl 1.16."
        )
    from rich.console import Console

    from kto_lightning.parity.run import run_parity
    from kto_lightning.parity.view import as_dict, show_result
    from kto_lightning.reports.terminal import strip_trailing_spaces

    result = run_parity(
        arguments.model,
        arguments.data,
        _settings(arguments),
        desirable_weight=arguments.desirable_weight,
        undesirable_weight=arguments.undesirable_weight,
        reference=arguments.reference,
        chat_template=arguments.chat_template,
        lora_rank=arguments.lora,
        options=tuple(options),
    )
    if arguments.json:
        print(json.dumps(as_dict(result), indent=2))
    else:
        console = Console(highlight=False)
        with strip_trailing_spaces(console):
            show_result(console, result)
    return result.agrees


def _settings(arguments: argparse.Namespace) -> Any:
    from dataclasses import fields

    from kto_lightning.parity.trace import Settings

    names = {field.name for field in fields(Settings)} - set(_WEIGHTS)
    return Settings(**{name: getattr(arguments, name) for name in names})
