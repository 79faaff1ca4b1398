"""`python -m kto_lightning fit`, `validate` and `predict`: what they print, and how they end."""

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
from kto_lightning.cli.parser import spelled_out
from kto_lightning.errors import ConfigError, KTOError, StoppedRun

_INTERRUPTED = 128 + signal.SIGINT
_TERMINATED = 128 + signal.SIGTERM


def _quieten() -> None:
    """Leave the screen to the summary and the bar: tips and device banners say nothing of a run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # a report asked for
    warnings.filterwarnings("ignore", module="lightning")
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # peft mends it itself
    transformers_logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _print_error(message: str) -> None:
    """On several ranks every one says what it met, and which it is, but for the first."""
    rank = getattr(rank_zero_only, "rank", 0)
    print(f"[rank {rank}] error: {message}" if rank else f"error: {message}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run a command. Errors that a person can mend are one message on stderr, not a traceback.

    Returns:
        The exit status: 0; 1 for data or run; 2 for usage; 128 + a signal that ended the run.
    """
    _quieten()
    try:
        KTOCLI(spelled_out(sys.argv[1:] if argv is None else argv))
    except (ConfigError, MisconfigurationException) as error:
        _print_error(str(error))
        return 2
    except StoppedRun as stopped:
        if getattr(rank_zero_only, "rank", 0) == 0:  # all ranks say the same
            asked = isinstance(stopped, Preempted)  # which is no error
            print(stopped if asked else f"error: {stopped}", file=sys.stderr)
        return stopped.status
    except KTOError as error:
        _print_error(str(error))
        return 1
    except OSError as error:  # a full disk, a directory closed to us
        where = f"{error.filename}: " if error.filename else ""
        _print_error(f"{where}{error.strerror or error}. Check path and disk.")
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    except SIGTERMException:  # Lightning's, outside training
        return _TERMINATED
    except SystemExit as leave:
        if isinstance(leave.__context__, KeyboardInterrupt):  # which Lightning makes an exit of 1
            return _INTERRUPTED
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    return 0
