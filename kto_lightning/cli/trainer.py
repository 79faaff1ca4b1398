"""`python -m kto_lightning fit`, `validate` and `predict`: errors as messages, exit statuses."""

import logging
import os
import signal
import sys
import warnings

from datasets import disable_progress_bars
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers.utils import logging as transformers_logging

from kto_lightning.callbacks.preemption import Preempted
from kto_lightning.cli.lightning_cli import KTOCLI
from kto_lightning.cli.parser import expand_short_options, shorten
from kto_lightning.errors import (
    ConfigError,
    KTOError,
    OtherRankError,
    StoppedRun,
    error_message,
    os_error_message,
)

_INTERRUPTED = 128 + signal.SIGINT
_TERMINATED = 128 + signal.SIGTERM


def _silence_libraries() -> None:
    """Turn off tips, device banners and warnings of libraries that do not concern the run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(
        logging.INFO
    )  # the report of --trainer.profiler
    warnings.filterwarnings("ignore", module="lightning")
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # peft corrects it itself
    transformers_logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _print_error(message: str) -> None:
    """Print an error; ranks other than 0 prefix it with their number."""
    rank, message = getattr(rank_zero_only, "rank", 0), shorten(message)
    print(f"[rank {rank}] error: {message}" if rank else f"error: {message}", file=sys.stderr)


def _end_with(error: KTOError) -> int:
    """Print an error, unless another rank prints it; returns the exit status."""
    if isinstance(error, OtherRankError):
        return error.status
    _print_error(error_message(error))
    return 1


def main(argv: list[str] | None = None) -> int:
    """Run a command. Errors that a user can fix are a message on stderr, not a traceback.

    Args:
        argv: the command's name and its options; None: those of the process.

    Returns:
        The exit status: 0; 1 for data or run; 2 for usage; 128 + a signal that ended the run.
    """
    _silence_libraries()
    try:
        KTOCLI(expand_short_options(sys.argv[1:] if argv is None else argv))
    except (ConfigError, MisconfigurationException) as error:
        _print_error(error_message(error))
        return 2
    except StoppedRun as stopped:
        if getattr(rank_zero_only, "rank", 0) == 0:  # the message is the same on all ranks
            is_error = not isinstance(stopped, Preempted)
            shown = error_message(stopped)
            print(f"error: {shown}" if is_error else shown, file=sys.stderr)
        return stopped.status
    except KTOError as error:
        return _end_with(error)
    except OSError as error:
        _print_error(os_error_message(error))
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    except SIGTERMException:  # Lightning's, outside training
        return _TERMINATED
    except SystemExit as leave:
        if isinstance(leave.__context__, KeyboardInterrupt):  # Lightning exits with 1 instead
            return _INTERRUPTED
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    return 0
