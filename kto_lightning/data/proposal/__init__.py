"""Proposal of a mapping for a file that cannot be read as it stands, from its first rows.

`facts` (rows -> columns and their values) -> `names`, `labels`, `texts`, `turns` (how well a column
fits a field) -> `missing` (what no mapping gives) -> `propose` -> `mapping` (options to copy).
"""

from kto_lightning.data.proposal.facts import ColumnFacts, columns_of
from kto_lightning.data.proposal.mapping import Proposal, name_options
from kto_lightning.data.proposal.propose import propose

__all__ = ["ColumnFacts", "Proposal", "columns_of", "name_options", "propose"]
