"""The errors a person is meant to read: one line each, no traceback, exit status 1.

Every message says what is wrong, where, what was got and what to do.
"""


class KTOError(Exception):
    """Base of every error that the command line prints as a message instead of a traceback."""


class DataError(KTOError):
    """The records, files or tokens given cannot be trained on."""


class ModelError(KTOError):
    """A model, tokenizer or adapter directory cannot be loaded or does not fit the data."""


class ConfigError(KTOError):
    """Two settings contradict each other, or one is outside what it may be."""


class StoppedRun(KTOError):
    """A run ends between two optimizer steps, on all ranks alike, so that what it did can be saved.

    Attributes:
        status: the exit status.
    """

    status = 1
