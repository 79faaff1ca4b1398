"""The model card of a trained model: its origin, settings and results, and how to load it."""

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from kto_lightning.errors import printable

_CAUSAL = "AutoModelForCausalLM"
_LOAD_MODEL = """\
```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```
"""
_LOAD_ADAPTER = """\
```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```
"""
_LOAD_OTHER_ADAPTER = """\
```python
from peft import PeftConfig, PeftModel
from transformers import {auto_class}, AutoTokenizer

base = PeftConfig.from_pretrained("DIRECTORY").base_model_name_or_path
model = PeftModel.from_pretrained({auto_class}.from_pretrained(base), "DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```
"""
_PAPERS = {
    "kto": "KTO ([arXiv:2402.01306](https://arxiv.org/abs/2402.01306))",
    "apo_zero_unpaired": "APO-zero ([arXiv:2408.06266](https://arxiv.org/abs/2408.06266))",
}
_SETTINGS = (
    *("reference", "loss", "beta", "optimizer", "learning_rate", "weight_decay", "lr_schedule"),
    *("warmup_ratio", "gradient_clip_norm", "dtype", "quantization", "lora", "follow"),
)
_MARKUP = re.compile(r"([\\`*\[\]<>|!~&#])")
_DATA_SETTINGS = ("batch_size", "max_length", "truncation", "pairing")


def model_card(origin: Mapping[str, Any], *, is_adapter: bool, auto_class: str = _CAUSAL) -> str:
    """Markdown for the `README.md` of an exported directory.

    Args:
        origin: `KTOModule.origin`: policy, settings, data and last results, as plain values.
        is_adapter: whether the directory holds an adapter instead of a model.
        auto_class: the name of the class that opens the model or the adapter's base.
    """
    load = _LOAD_MODEL
    if is_adapter:
        load = _LOAD_ADAPTER if auto_class == _CAUSAL else _LOAD_OTHER_ADAPTER
    data = origin["data"]
    kind = "a low-rank adapter for" if is_adapter else "a model made from"
    method = _PAPERS.get(origin["loss"]) or _text(origin["loss"])
    settings = {name: origin.get(name) for name in _SETTINGS}
    settings |= {name: data.get(name) for name in _DATA_SETTINGS}
    metadata = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["kto", "kto-lightning"],
    )
    return "\n".join(
        [
            f"---\n{metadata.to_yaml()}\n---",
            f"\nThis is {kind} {_code(origin['policy'])}, trained with {method} on "
            "completions that users marked desirable or undesirable, by kto_lightning.",
            f"\n## How to load it\n\n{load.format(auto_class=auto_class)}",
            f"## Data\n\n{_data_table(data)}",
            f"## Settings\n\n{_table(settings)}",
            f"## Results\n\nAfter {_text(origin['step'])} optimizer steps; rewards are β times "
            f"the log ratio to the reference.\n\n{_table(origin['results'])}",
        ]
    )


def _data_table(data: Mapping[str, Any]) -> str:
    train = data.get("train")
    return _table(
        {
            "records": ", ".join(map(str, train)) if isinstance(train, list) else train,
            **{
                side: f"{data.get(side)}, each weighted {data.get(f'{side}_weight')}"
                for side in ("desirable", "undesirable")
            },
            "held out": data.get("validation"),
        }
    )


def _table(rows: Mapping[str, Any]) -> str:
    """A Markdown table with a row per value that is not None."""
    shown = {name: value for name, value in rows.items() if value is not None}
    lines = [f"| {_text(name)} | {_text(value)} |" for name, value in shown.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def _text(value: Any) -> str:
    """A value as Markdown text: whatever Markdown or HTML would read in it is escaped."""
    text = printable(f"{value:.6g}" if isinstance(value, float) else str(value))
    return _MARKUP.sub(r"\\\1", text)


def _code(text: str) -> str:
    """A name as code, between more backticks than it has."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{printable(text)}{space}{fence}"
