"""Every family of the installed transformers: `pytest -m slow tests/architectures`, an hour."""

from pathlib import Path

import pytest

from tests.architectures.build import families
from tests.architectures.checks import check_family
from tests.architectures.isolation import isolated
from tests.architectures.outcomes import expected

SECONDS = 400


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of models that nobody maintains
@pytest.mark.parametrize("family", families())
def test_a_family(family: str, tmp_path: Path) -> None:
    found = isolated(check_family, family, tmp_path, checkpointing=True, seconds=SECONDS)
    assert family in expected(), f"new: {found}. Run `python -m tests.architectures.outcomes`."
    assert found.outcome == expected()[family].outcome, found
