"""The objective: loss, β and class weights. Batches need partners and weights by it."""

from dataclasses import dataclass
from typing import Literal, get_args

from kto_lightning.batches.class_weights import ClassWeights, resolve_weights
from kto_lightning.errors import check_number, check_one_of

LossName = Literal["kto", "apo_zero_unpaired"]
"""The values of `--model.loss`; `loss.py` has their equations."""


def has_reference_point(loss: LossName | str) -> bool:
    """Whether the loss has a z0, for which batches need mismatched completions; else z0 is 0."""
    return loss != "apo_zero_unpaired"


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """The loss and its settings, under the names of `KTOModule`'s arguments.

    Raises:
        ConfigError: if one is outside what it may be.
    """

    beta: float
    loss: LossName
    desirable_weight: Literal["auto"] | float
    """λ_D; auto: see `resolve_weights`."""
    undesirable_weight: Literal["auto"] | float
    """λ_U"""

    def __post_init__(self) -> None:
        check_number("beta", self.beta, above=0.0)
        check_one_of("--model.loss", self.loss, get_args(LossName))
        self.class_weights(1, 1)

    @property
    def needs_partners(self) -> bool:
        """Whether batches need mismatched completions."""
        return has_reference_point(self.loss)

    def class_weights(self, num_desirable: int, num_undesirable: int) -> ClassWeights:
        """The class weights for records of which so many are of each class."""
        return resolve_weights(
            num_desirable,
            num_undesirable,
            desirable=self.desirable_weight,
            undesirable=self.undesirable_weight,
        )
