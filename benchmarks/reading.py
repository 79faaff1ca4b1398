"""What a mapping of columns and an importer cost, as shares of reading a million lines.

    python -m benchmarks.reading [--lines 1000000] [--limit 0.15]

The same records in several forms: with the columns of a record, with columns of other names and
paths, and as the exports of five tools. Block by block three things are
timed in turn, in CPU seconds of this process: parsing the lines (A), parsing and mapping or
importing them (B), and all of reading, as `fit` reads before it tokenizes (C). A form's share is
(B - A) / C. The exit status is 1 if one is above the limit.
"""

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

WORDS = ("the", "river", "garden", "winter", "letter", "bridge", "teacher", "engine", "island")
BLOCK = 20_000
"""Lines per block."""
MAPPING = {
    **{"prompt": "chat.question", "completion": "chat.answer"},
    **{"label": "scores.0.value", "weight": "sure"},
}

Line = tuple[str, str, bool]


def record_of(line: Line) -> dict[str, Any]:
    prompt, completion, good = line
    return {"prompt": prompt, "completion": completion, "label": good, "weight": 1.0}


def renamed_of(line: Line) -> dict[str, Any]:
    prompt, completion, good = line
    return {"question": prompt, "answer": completion, "rating": good, "sure": 1.0}


def nested_of(line: Line) -> dict[str, Any]:
    prompt, completion, good = line
    chat = {"question": prompt, "answer": completion}
    return {"chat": chat, "scores": [{"value": good}], "sure": 1.0}


def open_webui_of(line: Line) -> dict[str, Any]:
    prompt, completion, good = line
    messages = {
        "u": {"id": "u", "parentId": None, "role": "user", "content": prompt},
        "a": {"id": "a", "parentId": "u", "role": "assistant", "content": completion},
    }
    return {
        "type": "rating",
        "data": {"rating": 1 if good else -1, "reason": "", "tags": []},
        "meta": {"message_id": "a", "chat_id": "c"},
        "snapshot": {"chat": {"chat": {"history": {"messages": messages, "currentId": "a"}}}},
    }


def fastchat_of(line: Line) -> dict[str, Any]:
    prompt, completion, good = line
    return {
        "tstamp": 1.5,
        "type": "upvote" if good else "downvote",
        "model": "m",
        "state": {
            **{"template_name": "t", "system_message": "", "roles": ["USER", "ASSISTANT"]},
            **{"messages": [["USER", prompt], ["ASSISTANT", completion]], "offset": 0},
            "conv_id": "c",
        },
        "ip": "",
    }


def librechat_of(line: Line) -> dict[str, Any]:
    prompt, completion, good = line
    question = {
        **{"messageId": "u", "parentMessageId": "00000000-0000-0000-0000-000000000000"},
        **{"conversationId": "c", "sender": "User", "text": prompt, "isCreatedByUser": True},
    }
    answer = {
        **{"messageId": "a", "parentMessageId": "u", "conversationId": "c", "sender": "GPT"},
        **{"text": completion, "isCreatedByUser": False},
        "feedback": {"rating": "thumbsUp" if good else "thumbsDown"},
    }
    return {"conversationId": "c", "title": "t", "messages": [question, answer]}


def chainlit_of(line: Line) -> dict[str, Any]:
    prompt, completion, good = line
    question = {
        "id": "u",
        "threadId": "c",
        "type": "user_message",
        "output": prompt,
        "parentId": None,
    }
    answer = {
        **{"id": "a", "threadId": "c", "type": "assistant_message", "parentId": None},
        "output": completion,
        "feedback": {"forId": "a", "id": "f", "value": int(good)},
    }
    return {"id": "c", "name": "t", "steps": [question, answer]}


def gradio_of(line: Line) -> dict[str, Any]:
    prompt, completion, good = line
    conversation = [
        {"role": "user", "metadata": None, "content": prompt, "options": None},
        {"role": "assistant", "metadata": None, "content": completion, "options": None},
    ]
    value = "Like" if good else "Dislike"
    return {"conversation": json.dumps(conversation), "index": "[1, 1]", "value": value}


def make_lines(count: int, random: Random) -> Iterable[Line]:
    for number in range(count):
        prompt = f"{number}: {' '.join(random.choices(WORDS, k=20))}?"
        yield (
            prompt,
            " ".join(random.choices(WORDS, k=random.randint(5, 60))),
            random.random() < 0.7,
        )


def cpu_seconds(work: Iterable[object]) -> float:
    """The CPU time of exhausting an iterator."""
    started = time.process_time()
    deque(work, maxlen=0)
    return time.process_time() - started


def main() -> int:
    parser = argparse.ArgumentParser(description="Shares of a mapping and of importers.")
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--limit", type=float, default=0.15)
    options = parser.parse_args()
    import datasets

    from kto_lightning.data.columns import ColumnMapping, Columns
    from kto_lightning.data.dataset import load_records
    from kto_lightning.data.importers import IMPORTERS
    from kto_lightning.data.record_settings import RecordSettings
    from kto_lightning.data.rows import Row
    from kto_lightning.data.sources import expand

    datasets.disable_progress_bars()
    flat = Columns(prompt="question", completion="answer", label="rating", weight="sure")
    forms: dict[str, tuple[Callable[[Line], dict], Columns | None, str | None]] = {
        "own columns": (record_of, None, None),
        "named columns": (renamed_of, flat, None),
        "paths": (nested_of, Columns(**MAPPING), None),
        "Open WebUI": (open_webui_of, None, "open_webui"),
        "FastChat": (fastchat_of, None, "fastchat"),
        "LibreChat": (librechat_of, None, "librechat"),
        "Chainlit": (chainlit_of, None, "chainlit"),
        "Gradio": (gradio_of, None, "gradio"),
    }
    spent = {name: [0.0, 0.0, 0.0] for name in forms}
    random = Random(0)
    print(f"{options.lines:,} lines of each form, Python {platform.python_version()}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "block.jsonl"
        for start in range(0, options.lines, BLOCK):
            lines = list(make_lines(min(BLOCK, options.lines - start), random))
            for name, (write, columns, importer) in forms.items():
                path.write_text("".join(json.dumps(write(line)) + "\n" for line in lines))
                (source,) = expand(str(path))
                mapping = ColumnMapping(columns, write(lines[0]))

                def mapped(
                    source: Any = source, mapping: Any = mapping, importer: str | None = importer
                ) -> Iterable[object]:
                    rows = source.rows()
                    if importer is not None:
                        return IMPORTERS[importer].records(rows)
                    return (mapping.fields_of(row.value) for row in rows if isinstance(row, Row))

                settings = RecordSettings(columns=columns)
                spent[name][0] += cpu_seconds(source.rows())
                spent[name][1] += cpu_seconds(mapped())
                started = time.process_time()
                load_records(str(path), settings, cache_dir=str(Path(scratch) / "cache"))
                spent[name][2] += time.process_time() - started
                shutil.rmtree(Path(scratch) / "cache")
    print(f"{'':14}  parsing  + mapping  reading      share  (CPU seconds)")
    worst = 0.0
    for name, (parsed, with_mapping, read) in spent.items():
        share = (with_mapping - parsed) / read
        worst = max(worst, share)
        print(f"{name:14} {parsed:8.1f} {with_mapping:10.1f} {read:8.1f} {share:10.1%}")
    if worst > options.limit:
        print(f"a share of {worst:.1%} is above {options.limit:.0%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
