"""`python -m kto_lightning inspect FILE…`: the data report as text, JSON or an HTML page.

Heavy modules are imported inside functions, so that help and usage errors appear at once.
"""

import argparse
import os
import re
import sys

from kto_lightning.cli.arguments import PrintableParser
from kto_lightning.cli.paths import expanded_path
from kto_lightning.cli.record_options import add_record_options, record_settings
from kto_lightning.errors import ConfigError, KTOError, error_message, printable

DEFAULT_MAX_LENGTH = 1024
FIT_KEYS = re.compile(
    r"--data\.((?:tokenizer|chat_template|max_length|columns|labels|unlabeled|chat|format|repeated)\b)"
)
"""Options as messages shared with `fit` name them; `inspect` has them without the group too."""
NUM_TRIED = 3


def main(argv: list[str]) -> int:
    """Run `inspect` with the arguments after its name.

    Returns:
        The exit status: 0; 1 if the data or the tokenizer cannot be read, or some source has no
        usable record; 2 for wrong usage, such as a column that no record has.
    """
    try:
        _inspect(_parse(argv))
    except SystemExit as end:  # a parser has printed its help or its usage error
        return int(end.code or 0)
    except KTOError as error:
        message = FIT_KEYS.sub(r"--\1", error_message(error))
        print(f"error: {message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = PrintableParser(
        prog="python -m kto_lightning inspect",
        usage="%(prog)s [options] FILE [FILE ...]",
        description="Report on feedback data: labels and their order, class weights, lengths, "
        "duplicates, and advice. Several files are shown side by side.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a file (jsonl, json, csv, tsv, parquet, arrow; texts also as gz, zst, bz2, xz), a "
        "glob in quotes, a folder of save_to_disk, or a hub data set (owner/name, "
        "owner/name:split, owner/name/config:split)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        type=os.path.expanduser,
        help="measure lengths in tokens, not in characters",
    )
    parser.add_argument(
        "--chat_template",
        metavar="FILE_OR_NAME",
        type=os.path.expanduser,
        help="instead of the tokenizer's: a Jinja chat template, the name of one of its other "
        "templates, or another tokenizer",
    )
    parser.add_argument(
        "--batch_size", type=int, default=8, metavar="N", help="examples per step (default: 8)"
    )
    parser.add_argument(
        "--max_length",
        type=int,
        metavar="N",
        help=f"tokens after which a record is truncated (default: {DEFAULT_MAX_LENGTH})",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON: an object, or a list for several files"
    )
    parser.add_argument(
        "--html",
        type=expanded_path,
        metavar="FILE",
        help="also write the report, with plots, as an HTML page",
    )
    parser.add_argument(
        "--try",
        dest="num_tried",
        action="store_const",
        const=NUM_TRIED,
        default=0,
        help=f"show the first {NUM_TRIED} records as they would be trained; with --tokenizer "
        "rendered by its chat template",
    )
    add_record_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        parser.error(f"--batch_size must be at least 1, got {arguments.batch_size}")
    if arguments.max_length is not None and arguments.max_length < 2:
        parser.error(f"--max_length must be at least 2, got {arguments.max_length}")
    for key in ("chat_template", "max_length"):
        if getattr(arguments, key) is not None and arguments.tokenizer is None:
            parser.error(f"--{key} needs --tokenizer DIR: without one, lengths are in characters")
    return arguments


def _inspect(arguments: argparse.Namespace) -> None:
    """Print and write the reports.

    Raises:
        SystemExit: with status 2, for a wrong setting.
        KTOError: if data or tokenizer cannot be read; at the end, if a source has no usable record.
    """
    settings = record_settings(arguments)
    from rich.console import Console

    from kto_lightning.reports.data import as_json, report_of_source
    from kto_lightning.reports.data.view import show_reports

    tokenizer = _load_tokenizer(arguments)
    reports = [
        report_of_source(
            file,
            settings,
            tokenizer=tokenizer,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length or DEFAULT_MAX_LENGTH,
            num_tried=arguments.num_tried,
        )
        for file in arguments.files
    ]
    if arguments.html is not None:
        from kto_lightning.reports.data.page import data_page
        from kto_lightning.reports.html import write_page

        write_page(data_page(reports), arguments.html)
    if arguments.json:
        contents = [report.to_dict() for report in reports]
        print(as_json(contents[0] if len(contents) == 1 else contents))
    else:
        show_reports(Console(highlight=False), reports)
        if arguments.html is not None:
            print(f"\npage      {printable(str(arguments.html))}")
    unusable = [
        file for file, report in zip(arguments.files, reports, strict=True) if not report.examples
    ]
    if unusable:
        raise KTOError(f"{', '.join(unusable)}: no usable record. See what is said above.")


def _load_tokenizer(arguments: argparse.Namespace):
    if arguments.tokenizer is None:
        return None
    import datasets
    from transformers.utils import logging

    from kto_lightning.models.tokenizer import load_tokenizer

    logging.set_verbosity_error()  # else a warning for every text longer than the model's context
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return load_tokenizer(arguments.tokenizer, chat_template=arguments.chat_template)
