"""`python -m kto_lightning.demo`: make a tiny model, align it with `fit`, compare the two."""

import argparse
import os
import sys
from pathlib import Path

from kto_lightning.cli.streams import protect_streams
from kto_lightning.errors import KTOError, error_message


def main(argv: list[str] | None = None) -> int:
    """Run the demo; the exit status: 0, 1 for a run that failed (2 for usage, by argparse)."""
    parser = argparse.ArgumentParser(prog="python -m kto_lightning.demo", description=__doc__)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("demo_output"),
        help="the demo's folder; an earlier demo's files in it are replaced (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    # Set before any hub library is imported: the demo downloads nothing.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from kto_lightning.demo.run import run_demo  # imports torch, which --help does not need

    try:
        return run_demo(arguments.output_dir, arguments.seed)
    except KTOError as error:
        print(error_message(error), file=sys.stderr)
        return 1


if __name__ == "__main__":
    protect_streams()
    sys.exit(main())
