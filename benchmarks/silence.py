"""Silence the libraries' progress bars, advice and warnings, so that only tables are printed."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging


def be_quiet() -> None:
    """Silence the libraries in this process from now on."""
    for library in ("lightning.pytorch", "trl"):
        logging.getLogger(library).setLevel(logging.ERROR)
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")


@contextmanager
def quiet() -> Iterator[None]:
    """The same; warning filters are restored on exit."""
    with warnings.catch_warnings():
        be_quiet()
        yield
