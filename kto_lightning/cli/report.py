"""`python -m kto_lightning report OUTPUT`: the run report as an HTML page. No model is loaded.

Heavy modules are imported inside functions, so that help and usage errors appear at once.
"""

import argparse
import sys
import textwrap

from kto_lightning.cli.arguments import PrintableParser
from kto_lightning.cli.paths import expanded_path
from kto_lightning.errors import KTOError, error_message, printable


def main(argv: list[str]) -> int:
    """Run `report` with the arguments after its name.

    Returns:
        The exit status: 0; 1 if there is no run or the page cannot be written; 2 for wrong usage.
    """
    try:
        arguments = _parse(argv)
    except SystemExit as end:  # argparse has printed its help or its usage error
        return int(end.code or 0)
    try:
        from kto_lightning.reports.run import write_run_report

        path, verdict = write_run_report(arguments.output_dir, arguments.html)
    except KTOError as error:
        print(f"error: {error_message(error)}", file=sys.stderr)
        return 1
    print(textwrap.fill(printable(verdict), width=79))
    print(f"report    {printable(str(path))}")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = PrintableParser(
        prog="python -m kto_lightning report",
        description="The report of a run, finished or not, as one HTML page: a verdict in plain "
        "words, its curves, held-out numbers and data.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "output_dir", metavar="OUTPUT", type=expanded_path, help="a run's --output_dir"
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        type=expanded_path,
        help="where to write (default: OUTPUT/report.html)",
    )
    return parser.parse_args(argv)
