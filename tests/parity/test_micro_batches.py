"""z0 under gradient accumulation: per micro-batch in TRL 1.16, per optimizer step in `fit`."""

from pathlib import Path
from typing import Any

import pytest

from kto_lightning.parity.agreement import EARLY
from kto_lightning.parity.our_trace import our_trace
from kto_lightning.parity.trace import Inputs, Settings
from kto_lightning.parity.trl_trace import trl_trace
from tests.support.factories import make_tokenizer, save_model, write_jsonl

SETTINGS = Settings(steps=1, batch_size=8, optimizer="sgd")

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and Lightning


def _records() -> list[dict[str, Any]]:
    """Neighbours have different prompts, so that our rings of two are TRL's blocks of two."""
    words = ("river", "garden", "winter", "letter", "bridge", "teacher", "engine")
    return [
        {
            "prompt": f"{i} {words[i % 7]}:",
            "completion": " " + " ".join(words[(i * k + 3) % 7] for k in range(1, 3 + i % 5)),
            "label": i % 3 != 1,
        }
        for i in range(SETTINGS.batch_size)
    ]


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    """The reference is another model: z0 is far from 0, on both sides of the clamp, at once."""
    tokenizer = make_tokenizer()
    return Inputs(
        model=str(save_model(tmp_path / "model", "llama", tokenizer)),
        reference=str(save_model(tmp_path / "reference", "llama", tokenizer, seed=1)),
        train=str(write_jsonl(tmp_path / "train.jsonl", _records())),
    )


def test_accumulation_changes_the_gradient_of_trl_alone(inputs: Inputs, tmp_path: Path):
    """The same model, partners and batch; only the number of examples that share a z0 differs."""
    theirs = trl_trace(inputs, SETTINGS, tmp_path / "trl", micro_batch_size=2).columns
    one_piece, in_pieces = (
        our_trace(
            inputs,
            SETTINGS,
            tmp_path / name,
            *("--data.pairing", "distinct_prompts", "--data.max_tokens", str(max_tokens)),
        ).columns
        for name, max_tokens in (("one", 16384), ("several", 48))
    )
    means, z0s = theirs["train/z0_raw"], theirs["train/z0"]
    assert z0s == [max(0.0, mean) for mean in means]
    assert len(z0s) == 4
    assert 0 < z0s.count(0.0) < 4, "the clamp must matter, and not everywhere"

    mean = sum(means) / 4
    tolerance = EARLY * max(theirs["mismatched_logps"])
    for ours in (one_piece, in_pieces):
        assert ours["train/z0_raw"] == pytest.approx([mean], abs=tolerance)
        assert ours["train/z0"] == pytest.approx([max(0.0, mean)], abs=tolerance)
    (ours,), (cut,), (trl,) = (t["train/grad_norm"] for t in (one_piece, in_pieces, theirs))
    assert cut == pytest.approx(ours, rel=EARLY)
    assert trl != pytest.approx(ours, rel=1e-2)
