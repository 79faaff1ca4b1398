"""One family for each way in which models differ; `test_sweep.py` has all families."""

from pathlib import Path

import pytest

from tests.architectures.checks import check_family
from tests.architectures.outcomes import expected

MECHANISMS = {
    "grouped queries": "llama",
    "sliding windows": "mistral",
    "soft-capping": "gemma2",
    "attention sinks": "gpt_oss",
    "latent attention": "deepseek_v3",
    "experts with an auxiliary loss": "qwen3_moe",
    "chunked attention": "llama4_text",
    "attention to chosen keys": "deepseek_v32",
    "linear attention": "qwen3_next",
    "Mamba-2": "granitemoehybrid+both",
    "short convolutions": "lfm2",
    "ALiBi": "bloom",
    "attention of its own": "gptj",
    "a state space without a cache to continue": "mamba",
    "rotation by length": "phi3+longrope",
    "layers that share keys": "gemma4_text+kvshared",
    "images": "qwen2_5_vl@image",
    "an encoder": "bert",
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", MECHANISMS.values(), ids=MECHANISMS.keys())
def test_a_mechanism(family: str, tmp_path: Path) -> None:
    found = check_family(family, tmp_path, checkpointing=False)
    assert found.outcome == expected()[family].outcome, found
