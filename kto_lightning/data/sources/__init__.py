"""Sources of records: files, folders, hub data sets and objects, read row by row.

This room knows formats; what a row must contain is up to `records`.
"""

from kto_lightning.data.sources.expand import SourceLike, expand, items_of, names_of
from kto_lightning.data.sources.source import Choose, Source

__all__ = ["Choose", "Source", "SourceLike", "expand", "items_of", "names_of"]
