"""A process of a job of `tests.support.ranks`: one rank, which runs the command line.

The fork server imports this module before it forks, so that a rank has nothing left to import.
Shapes are checked as under pytest, and reports have no charts.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

with install_import_hook(["kto_lightning", "kto_kernels"], "beartype.beartype"):
    import kto_lightning.cli.export
    import kto_lightning.cli.trainer  # noqa: F401 - so that no rank imports it again
    from kto_lightning.__main__ import main
    from tests.support.pages import undraw


def run_rank(
    arguments: list[str],
    environment: dict[str, str],
    files: tuple[Path, Path],
    prepare: Callable[[], None] | None,
) -> None:
    """Run the command line with its output in two files, and exit with its status.

    Args:
        arguments: of the command line.
        environment: what a launcher would set for this rank, and what a test adds.
        files: for stdout and stderr.
        prepare: called first, to change something inside this process.
    """
    for descriptor, path in zip((1, 2), files, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(environment)
    # A child of a fork server would start its own children by one; a rank of a launcher does not.
    multiprocessing.set_start_method(None, force=True)
    undraw(pytest.MonkeyPatch())
    status = 1
    try:
        if prepare is not None:
            prepare()
        status = main(arguments)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(status)
