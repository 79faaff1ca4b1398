"""Exports of feedback tools: one module for each tool, recognised by the structure of its rows."""

from collections.abc import Sequence

from kto_lightning.data.importers import chainlit, fastchat, gradio, librechat, open_webui
from kto_lightning.data.importers.importer import Importer

IMPORTERS: dict[str, Importer] = {
    "open_webui": open_webui.IMPORTER,
    "librechat": librechat.IMPORTER,
    "gradio": gradio.IMPORTER,
    "fastchat": fastchat.IMPORTER,
    "chainlit": chainlit.IMPORTER,
}
"""By the name that `--data.format` takes."""


def find_importer(first_rows: Sequence[object]) -> str | None:
    """The name of the importer whose export the values of a file's first rows are part of."""
    return next((name for name, it in IMPORTERS.items() if it.matches(first_rows)), None)
