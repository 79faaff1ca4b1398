"""`python -m kto_lightning`: help and version before the heavy imports, then a command."""

import os
import sys
from errno import ENAMETOOLONG
from importlib import import_module
from importlib.metadata import version

from kto_lightning.cli.streams import lost_output, protect_streams
from kto_lightning.cli.waiting import wait_passively
from kto_lightning.errors import printable
from kto_lightning.strategies.parent import end_with_parent

TRAINER = "kto_lightning.cli.trainer"
COMMANDS = {
    "fit": TRAINER,
    "validate": TRAINER,
    "predict": TRAINER,
    "inspect": "kto_lightning.cli.inspect",
    "report": "kto_lightning.cli.report",
    "export": "kto_lightning.cli.export",
    "parity": "kto_lightning.parity.command",
    "demo": "kto_lightning.demo.__main__",
}
"""Modules of the commands: `main(argv)` returns the exit status. It gets the arguments after the
command's name, but for `TRAINER`, whose parser reads the name too."""

PRINTS_ITS_RESULT = ("inspect", "validate")
"""Commands that fail where stdout cannot be written; the others go on without it."""

LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "JSM_NAMESPACE_RANK"),
)

USAGE = """\
usage: python -m kto_lightning COMMAND [options]

KTO fine-tuning of language models from records that users marked good or bad.

commands:
  fit       train a model:  --model.policy DIR_OR_HUB_ID --data.train FILE [--output_dir DIR]
  validate  loss, rewards and reward AUC on held-out records:  --data.validation FILE
  predict   a reward for every record:  --data.predict FILE
  inspect   report on files of records:  FILE… [--try] [--tokenizer DIR] [--html FILE]
  report    report on a run, finished or not, as an HTML page:  OUTPUT [--html FILE]
  export    a checkpoint to a Hugging Face directory:  CHECKPOINT DIR [--merge]
  parity    TRL's KTOTrainer and `fit` side by side:  --model DIR --data FILE
  demo      align a tiny model, or yours, and compare:  [--model DIR] [--output_dir DIR]

options:
  COMMAND --help      all options of a command
  --config FILE       options from a YAML file; those given after it win
  --version           print the version

A record is a line of JSON: {"prompt": "…", "completion": "…", "label": true}
"""


def _launcher_problem() -> str | None:
    """What is wrong with a launcher's variables: libraries read them when they are imported, and a
    rank that is not 0 writes nothing."""
    for name in LAUNCHER_VARIABLES:
        value = os.environ.get(name)
        if value is not None and not (value.isascii() and value.isdigit() and len(value) < 10):
            return (
                f"the environment variable {name} must be a whole number, as torchrun and SLURM "
                f"set it, got '{printable(value[:60])}'. Unset it."
            )
    return None


def main(argv: list[str] | None = None) -> int:
    """Answer what needs no imports, and pass the rest to the command's module.

    Returns:
        The exit status: 0; 1 for data or run; 2 for usage.
    """
    end_with_parent()
    wait_passively()
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        sys.stderr.write(USAGE)
        return 2
    command = arguments[0]
    if command in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
        return 0
    if command == "--version":
        sys.stdout.write(f"kto_lightning {version('kto-lightning')}\n")
        return 0
    if command not in COMMANDS and not command.startswith("-"):
        sys.stderr.write(
            f"error: there is no command '{printable(command)}'. "
            f"There are: {', '.join(COMMANDS)}.\n"
            "help: python -m kto_lightning --help\n"
        )
        return 2
    problem = _launcher_problem()
    if problem is not None:
        sys.stderr.write(f"error: {problem}\n")
        return 2
    name = COMMANDS.get(command, TRAINER)
    try:
        return import_module(name).main(arguments if name == TRAINER else arguments[1:])
    except OSError as error:
        if error.errno != ENAMETOOLONG:
            raise
        path = printable(str(error.filename))
        print(f"error: {path[:60]}…: {error.strerror}. Check the path.", file=sys.stderr)
        return 1


def run() -> int:
    """`main` of a process whose standard streams may be closed, full or nobody's.

    Returns:
        The exit status.
    """
    protect_streams()
    try:
        status = main()
    except KeyboardInterrupt:  # during the imports
        return 130
    error = lost_output()
    if status == 0 and error is not None and sys.argv[1] in PRINTS_ITS_RESULT:
        print(f"error: the output cannot be written: {error.strerror}.", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(run())
