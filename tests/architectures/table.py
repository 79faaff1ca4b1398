"""`python -m tests.architectures.table [MODELS ...]`: the table of families in `docs/models.md`.

Routes are those of `outcomes.json`; prices are counted, some seconds a family. Where models are
named, the other rows stay as they are.
"""

import re
import sys
import tempfile
from pathlib import Path

from kto_lightning.models.text_part import shown_names
from tests.architectures.isolation import isolated
from tests.architectures.loading import Outcome
from tests.architectures.outcomes import be_quiet, expected, versions

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
COLUMNS = ["models", "class", "route", "× SFT", "with a cache", "why no faster route", "frozen"]
SECONDS = 600
NO_PRICE = "–"
WIDELY_USED = {
    "Llama 2, 3": "llama",
    "Llama 4": "llama4@image",
    "Mistral": "mistral",
    "Mixtral": "mixtral",
    "Mistral Small, Ministral 3": "mistral3@image",
    "Qwen2, Qwen2.5": "qwen2+nowindow",
    "Qwen3": "qwen3+nowindow",
    "Qwen3-MoE": "qwen3_moe",
    "Qwen3-Next": "qwen3_next",
    "Qwen3.5": "qwen3_5@image",
    "Qwen2.5-VL": "qwen2_5_vl@image",
    "Qwen3-VL": "qwen3_vl@image",
    "Gemma 2": "gemma2",
    "Gemma 3": "gemma3@image",
    "Gemma 3, text": "gemma3_text",
    "Gemma 3n, text": "gemma3n_text",
    "Gemma 4": "gemma4@image",
    "Phi-3, Phi-4": "phi3+longrope",
    "Phi-3.5-MoE": "phimoe+nowindow",
    "gpt-oss": "gpt_oss",
    "DeepSeek-V2": "deepseek_v2",
    "DeepSeek-V3, R1": "deepseek_v3+yarn",
    "DeepSeek-V3.2": "deepseek_v32",
    "GLM-4": "glm4",
    "GLM-4.5": "glm4_moe",
    "GLM with sparse attention (DSA)": "glm_moe_dsa",
    "Granite 3": "granite",
    "Granite 4, dense": "granitemoehybrid+dense_attention",
    "Granite 4-H": "granitemoehybrid+both",
    "Nemotron-H": "nemotron_h",
    "Falcon-H1": "falcon_h1",
    "LFM2": "lfm2",
    "OLMo 2": "olmo2",
    "OLMo 3": "olmo3",
    "SmolLM3": "smollm3",
    "SmolVLM": "smolvlm@image",
    "InternVL": "internvl@image",
    "LLaVA": "llava@image",
    "Kimi K2.5": "kimi_k25@image",
    "Kimi-Linear": "kimi_linear",
    "MiniMax": "minimax",
    "MiniMax-M2": "minimax_m2",
    "Command R7B, Command A": "cohere2",
    "EXAONE 4": "exaone4",
    "ERNIE 4.5": "ernie4_5",
    "Hunyuan": "hunyuan_v1_dense",
    "Seed-OSS": "seed_oss",
    "StableLM": "stablelm",
    "Falcon": "falcon",
    "BLOOM": "bloom",
    "Mamba": "mamba",
    "Jamba": "jamba",
    "Zamba2": "zamba2",
}
"""Families by the names of the models that people know."""
_TABLE = re.compile(r"(?<=<!-- families -->\n).*?(?=<!-- end of families -->)", re.DOTALL)


def facts(found: Outcome) -> list[str]:
    """The cells of a row that are not counted: class, route, why no faster one, frozen modules."""
    return [f"`{found.model_class}`", found.outcome, found.reason, shown_names(found.unused)]


def rows_of(page: str) -> dict[str, list[str]]:
    """The facts of each row of a page's table."""
    (block,) = _TABLE.findall(page)
    rows = re.findall(r"^\| (.*) \|$", block, re.MULTILINE)
    cells = (row.split(" | ") for row in rows[2:])
    return {
        models: [name, route, reason, frozen] for models, name, route, _, _, reason, frozen in cells
    }


def with_table(page: str, lines: list[str]) -> str:
    """The page with another table."""
    installed = ", ".join(f"{name} {number}" for name, number in versions().items())
    made = f"`python -m tests.architectures.table`, with {installed}."
    block = "\n".join(["", *lines, "", made, "", ""])
    return _TABLE.sub(lambda _: block, page)


def _row(models: str, family: str) -> str:
    name, route, reason, frozen = facts(expected()[family])
    return _line([models, name, route, *_prices(family, route), reason, frozen])


def _prices(family: str, route: str) -> list[str]:
    if route in ("refused", "not built"):
        return [NO_PRICE, NO_PRICE]
    from tests.architectures.price import price  # imports TRL, which takes seconds

    with tempfile.TemporaryDirectory() as directory:
        counted = isolated(price, family, Path(directory), seconds=SECONDS)
    return [f"{counted.computed:.2f}", f"{counted.cached:.2f}"]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(names: list[str]) -> None:
    be_quiet()
    page = PAGE.read_text(encoding="utf-8")
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    for models, family in WIDELY_USED.items():
        kept = re.search(rf"^\| {re.escape(models)} \|.*$", page, re.MULTILINE)
        if names and models not in names and kept:
            lines.append(kept.group())
        else:
            lines.append(_row(models, family))
            print(lines[-1], flush=True)
    PAGE.write_text(with_table(page, lines), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
