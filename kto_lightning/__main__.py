"""`python -m kto_lightning`: help and version before the heavy imports, then the command line."""

import sys
from importlib.metadata import version

USAGE = """\
usage: python -m kto_lightning COMMAND [options]

KTO fine-tuning of language models from records that users marked good or bad.

commands:
  fit       train a model:  --model.policy DIR_OR_HUB_ID --data.train FILE [--output_dir DIR]
  validate  loss, rewards and reward AUC on held-out records:  --data.validation FILE
  predict   a reward for every record:  --data.predict FILE
  inspect   report on files of records:  FILE… [--tokenizer DIR] [--json] [--html FILE]
  report    report on a run, finished or not, as an HTML page:  OUTPUT [--html FILE]
  export    a checkpoint to a Hugging Face directory:  CHECKPOINT DIR [--merge]
  parity    TRL's KTOTrainer and `fit` side by side:  --model DIR --data FILE

options:
  COMMAND --help      all options of a command
  --config FILE       options from a YAML file; those given after it win
  --version           print the version

A record is a line of JSON: {"prompt": "…", "completion": "…", "label": true}
"""


def main(argv: list[str] | None = None) -> int:
    """Answer what needs no imports, and hand the rest to the command line.

    Returns:
        The exit status: 0; 1 for data or run; 2 for usage.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        sys.stderr.write(USAGE)
        return 2
    if arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
        return 0
    if arguments[0] == "--version":
        sys.stdout.write(f"kto_lightning {version('kto-lightning')}\n")
        return 0
    if arguments[0] == "inspect":
        from kto_lightning.cli.inspect import inspect_main

        return inspect_main(arguments[1:])
    if arguments[0] == "report":
        from kto_lightning.cli.report import report_main

        return report_main(arguments[1:])
    if arguments[0] == "export":
        from kto_lightning.cli.export import export_main

        return export_main(arguments[1:])
    if arguments[0] == "parity":
        from kto_lightning.parity.command import parity_main

        return parity_main(arguments[1:])
    if not arguments[0].startswith("-") and arguments[0] not in ("fit", "validate", "predict"):
        sys.stderr.write(
            f"error: there is no command '{arguments[0]}'. There are: fit, validate, predict, "
            "inspect, report, export, parity.\nhelp: python -m kto_lightning --help\n"
        )
        return 2
    from kto_lightning.cli.trainer import main as run

    return run(arguments)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # during the imports
        sys.exit(130)
