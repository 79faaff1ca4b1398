"""Time and memory for reading, tokenizing and pairing a million records.

    python -m benchmarks.million_lines [--lines 1000000] [--tokenizer DIR] [--limit_mib 2048]

Writes a file of records to a temporary directory, with a cache of its own, and reads it as `fit`
does. Memory is summed over the process and its workers: own memory (USS), which is shared with no
other process, and resident memory, which includes shared memory and pages of the mapped cache file
that the system can reclaim. The exit status is 1 if own memory exceeds the limit.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import psutil

WORDS = ("the", "river", "garden", "winter", "letter", "bridge", "teacher", "engine", "island")
MIB = 2**20


def write_lines(path: Path, num_lines: int) -> None:
    random = Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_lines):
            record = {
                "prompt": f"{number}: {' '.join(random.choices(WORDS, k=20))}?",
                "completion": " ".join(random.choices(WORDS, k=random.randint(5, 60))),
                "label": random.random() < 0.7,
            }
            file.write(json.dumps(record) + "\n")


def small_tokenizer(directory: Path) -> Path:
    """Byte-level BPE with 512 ids, which gives more tokens per text than a real tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(directory)
    return directory


class PeakMemory(threading.Thread):
    """The peak memory of this process and its children, sampled ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own_mib = self.resident_mib = 0.0
        self._stopped = threading.Event()

    def run(self) -> None:
        parent = psutil.Process()
        while not self._stopped.wait(0.1):
            own = resident = 0
            for process in [parent, *parent.children(recursive=True)]:
                try:
                    memory = process.memory_full_info()
                except psutil.NoSuchProcess:
                    continue
                own, resident = own + memory.uss, resident + memory.rss
            self.own_mib = max(self.own_mib, own / MIB)
            self.resident_mib = max(self.resident_mib, resident / MIB)

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def measure(name: str, work: Callable[[], Any]) -> tuple[float, Any]:
    """Run `work`, print its time and memory; returns its peak own memory in MiB and its result."""
    memory, started = PeakMemory(), time.monotonic()
    memory.start()
    result = work()
    seconds = time.monotonic() - started
    memory.stop()
    print(
        f"{name:10} {seconds:8.1f} s  {memory.own_mib:8.0f} MiB own  "
        f"{memory.resident_mib:8.0f} MiB resident, summed over processes",
        flush=True,
    )
    return memory.own_mib, result


def main() -> int:
    parser = argparse.ArgumentParser(description="Read and tokenize a million records.")
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--tokenizer", help="a directory or hub id; none: a small one is trained")
    parser.add_argument("--limit_mib", type=float, default=2048.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_DATASETS_CACHE"] = str(Path(scratch) / "cache")  # read upon import
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        from kto_lightning.batches.pairing import pair_distinct_prompts
        from kto_lightning.data.dataset import load_records
        from kto_lightning.data.tokenize import tokenize_records
        from kto_lightning.models.tokenizer import load_tokenizer

        path = Path(scratch) / "lines.jsonl"
        write_lines(path, options.lines)
        size = f"{options.lines:,} lines, {path.stat().st_size / MIB:.0f} MiB"
        print(f"{size}, on {os.cpu_count()} cores, Python {platform.python_version()}", flush=True)
        tokenizer = load_tokenizer(options.tokenizer or str(small_tokenizer(Path(scratch) / "t")))
        reading, records = measure("reading", lambda: load_records(str(path)))
        tokenizing, examples = measure(
            "tokenizing", lambda: tokenize_records(records, tokenizer, max_length=1024)
        )
        pairing, _ = measure("pairing", lambda: pair_distinct_prompts(examples.prompt_keys, seed=0))
    most = max(reading, tokenizing, pairing)
    if most > options.limit_mib:
        print(f"{most:.0f} MiB are more than the limit of {options.limit_mib:.0f}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
