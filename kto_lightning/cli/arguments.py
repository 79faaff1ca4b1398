"""Parser of the commands that are not LightningCLI's."""

import argparse
from typing import NoReturn

from kto_lightning.errors import printable


class PrintableParser(argparse.ArgumentParser):
    """argparse's, with names of files in its usage errors as a terminal may show them."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))
