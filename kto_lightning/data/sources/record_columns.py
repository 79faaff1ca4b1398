"""The columns of a table that a record needs."""

from kto_lightning.data.texts import MEDIA_KEYS, SYSTEM_KEYS

COLUMNS = (
    *("prompt", "completion", "messages", "conversations", "chosen", "rejected"),
    *("label", "weight", "tools", "chat_template_kwargs"),
    *(*SYSTEM_KEYS, *MEDIA_KEYS),
)
"""The columns of a record; others are not read from a table that has what a record needs."""
NEEDED_COLUMNS = (
    *({"prompt", "completion", "label"}, {"messages", "label"}, {"conversations", "label"}),
    {"prompt", "chosen", "rejected"},
)


def record_columns(columns: list[str]) -> list[str]:
    """The columns of a record; all columns if one is missing, so that the error can name them."""
    if any(needed <= set(columns) for needed in NEEDED_COLUMNS):
        return [column for column in columns if column in COLUMNS]
    return columns
