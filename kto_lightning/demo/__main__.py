"""`python -m kto_lightning.demo`: make a tiny model, align it with `fit`, compare the two.

With `--model`, a model of your own: it answers instructions that a program can check, learns from
the verdicts, and answers instructions that it has not seen; further options go to `fit`.
"""

import argparse
import os
import sys
from pathlib import Path

from kto_lightning.cli.streams import protect_streams
from kto_lightning.cli.waiting import wait_passively
from kto_lightning.errors import KTOError, error_message


def main(argv: list[str] | None = None) -> int:
    """Run the demo; the exit status: 0, 1 for a run that failed (2 for usage, by argparse)."""
    parser = argparse.ArgumentParser(
        prog="python -m kto_lightning.demo", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("demo_output"),
        help="the demo's folder; an earlier demo's files in it are replaced (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--model", metavar="DIR", help="a causal language model; none: a tiny one is made"
    )
    arguments, options = parser.parse_known_args(argv)
    if options and arguments.model is None:
        parser.error(f"unrecognized arguments: {' '.join(options)} (only --model takes fit's)")
    wait_passively()
    # Set before any hub library is imported: the demo downloads nothing.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Both import torch, which --help does not need.
    from kto_lightning.demo.own_model import run_on_model
    from kto_lightning.demo.run import run_demo

    try:
        if arguments.model is not None:
            model = arguments.model
            return run_on_model(arguments.output_dir, model, arguments.seed, options)
        return run_demo(arguments.output_dir, arguments.seed)
    except KTOError as error:
        print(error_message(error), file=sys.stderr)
        return 1


if __name__ == "__main__":
    protect_streams()
    sys.exit(main())
