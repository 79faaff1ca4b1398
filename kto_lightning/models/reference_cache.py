"""A cache on disk of the reference's log-probs, shared by all runs with the same reference.

A cache directory has one folder per reference (`reference_fingerprint`), and in it one file per
process that has written there, of records of a key (`batches/collate.py`), a log-prob and a
checksum. Files are only appended to, with the records of a step in one write: processes do not
interfere with each other, and a crash loses at most the last record. Records with a wrong checksum
are ignored.
"""

import uuid
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b, file_digest
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from kto_lightning.batches.collate import KEY_BYTES
from kto_lightning.batches.types import Logps, PackedBatch
from kto_lightning.errors import KTOError
from kto_lightning.models.reference import Reference

FORMAT_VERSION = 1
RECORD = np.dtype([("key", f"V{KEY_BYTES}"), ("logp", "<f8"), ("checksum", "<u4")])
_CHECKED_BYTES = KEY_BYTES + 8


class ReferenceCache:
    """The log-probs of one reference, in memory and on disk.

    Args:
        directory: the folder of this reference; created with the first log-prob.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._file = self._directory / f"{uuid.uuid4().hex}.logps"
        self._logps: dict[bytes, float] = {}
        self._offsets: dict[str, int] = {}
        self.refresh()

    def __len__(self) -> int:
        return len(self._logps)

    def refresh(self) -> None:
        """Read the records that other processes have added."""
        if not self._directory.is_dir():
            return
        for path in sorted(self._directory.glob("*.logps")):
            with path.open("rb") as file:
                file.seek(self._offsets.get(path.name, 0))
                content = file.read()
            # The last record may still be incomplete: the next refresh reads it again.
            complete = len(content) - len(content) % RECORD.itemsize
            self._offsets[path.name] = self._offsets.get(path.name, 0) + complete
            self._logps.update(_valid_records(content[:complete]))

    def num_known(self, keys: Iterable[bytes]) -> int:
        """The number of keys with a log-prob in the cache."""
        return sum(key in self._logps for key in keys)

    def find(self, keys: Sequence[bytes]) -> list[float] | None:
        """The log-probs of all keys, in nats; None if one is missing."""
        if all(key in self._logps for key in keys):
            return [self._logps[key] for key in keys]
        return None

    def add(self, keys: Sequence[bytes], logps: Sequence[float]) -> None:
        """Store those log-probs, in nats, that are not in the cache yet.

        Raises:
            KTOError: if the disk is full or the directory cannot be written.
        """
        new = {k: v for k, v in zip(keys, logps, strict=True) if k not in self._logps}
        if not new:
            return
        self._logps.update(new)
        records = b"".join(_record(key, logp) for key, logp in new.items())
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab", buffering=0) as file:
                file.write(records)
        except OSError as error:
            raise KTOError(
                f"--model.reference_cache: {self._file} cannot be written: {error}. Make room, or "
                "remove the option."
            ) from error


def _record(key: bytes, logp: float) -> bytes:
    checked = key + np.float64(logp).tobytes()
    return checked + np.uint32(crc32(checked)).tobytes()


def _valid_records(content: bytes) -> dict[bytes, float]:
    records = np.frombuffer(content, dtype=RECORD)
    found = {}
    for start, record in zip(range(0, len(content), RECORD.itemsize), records, strict=True):
        checked = content[start : start + _CHECKED_BYTES]
        if crc32(checked) == record["checksum"] and np.isfinite(record["logp"]):
            found[checked[:KEY_BYTES]] = float(record["logp"])
    return found


class CachedReference:
    """A reference that computes only the log-probs that are not in the cache.

    Args:
        cache: the log-probs of the reference.
        keys: the keys of all log-probs that the run needs; None: not known in advance.
        make_reference: loads the model that computes missing log-probs; not called if none is
            missing, so that a complete cache needs no second model.
        agree: maps this rank's flags to whether each is set on any rank. For a sharded reference,
            which all ranks must run together; by default every rank decides for itself.
    """

    def __init__(
        self,
        cache: ReferenceCache,
        keys: set[bytes] | None,
        make_reference: Callable[[], Reference],
        agree: Callable[[Sequence[bool]], Sequence[bool]] = lambda own: own,
    ) -> None:
        self.cache, self._keys, self._agree = cache, keys, agree
        if keys is None:
            self.reference: Reference | None = make_reference()
            self.description = (
                f"log-probs from the cache (it has {len(cache):,}), the others from "
                f"{self.reference.description}"
            )
            return
        known = cache.num_known(keys)
        (is_incomplete,) = agree([known < len(keys)])
        self.reference = make_reference() if is_incomplete else None
        rest = "no model is loaded for it"
        if self.reference is not None:
            rest = f"the others from {self.reference.description}"
        self.description = f"{known:,} of {len(keys):,} log-probs from the cache, {rest}"

    def to(self, device: torch.device) -> None:
        if self.reference is not None:
            self.reference.to(device)

    def refresh(self) -> None:
        """Read what other processes have added, and free the model if the cache is complete.

        The model stays where it is not known in advance which log-probs the run needs.
        """
        self.cache.refresh()
        if self._keys is None:
            return
        (is_incomplete,) = self._agree([self.cache.num_known(self._keys) < len(self._keys)])
        if not is_incomplete:
            self.reference = None

    def logps(self, batch: PackedBatch, *, matched: bool = True, mismatched: bool = True) -> Logps:
        """See `Reference.logps`; the batch must have its keys."""
        assert batch.matched_keys is not None
        mismatched = mismatched and batch.mismatched_keys is not None
        found = Logps()
        if matched:
            found.matched = self._found(batch.matched_keys, batch)
        if mismatched and batch.mismatched_keys is not None:
            found.mismatched = self._found(batch.mismatched_keys, batch)
        needs_matched = matched and found.matched is None
        needs_mismatched = mismatched and found.mismatched is None
        if self.reference is not None:
            needs_matched, needs_mismatched = self._agree([needs_matched, needs_mismatched])
        if needs_matched or needs_mismatched:
            self._compute(batch, found, matched=needs_matched, mismatched=needs_mismatched)
        return found

    def _found(self, keys: list[bytes], batch: PackedBatch) -> Tensor | None:
        logps = self.cache.find(keys)
        if logps is None:
            return None
        return torch.tensor(logps, dtype=torch.float32).to(batch.weight.device, non_blocking=True)

    def _compute(
        self, batch: PackedBatch, found: Logps, *, matched: bool, mismatched: bool
    ) -> None:
        """Score with the model, into `found` and the cache."""
        if self.reference is None:
            raise KTOError(
                "the reference cache lost log-probs that it had when the run began. Resume with "
                "--ckpt_path last: missing ones are computed then."
            )
        computed = self.reference.logps(batch, matched=matched, mismatched=mismatched)
        if computed.matched is not None and batch.matched_keys is not None:
            found.matched = computed.matched
            self.cache.add(batch.matched_keys, computed.matched.tolist())
        if computed.mismatched is not None and batch.mismatched_keys is not None:
            found.mismatched = computed.mismatched
            self.cache.add(batch.mismatched_keys, computed.mismatched.tolist())


def reference_fingerprint(directories: Sequence[Path], settings: Sequence[str]) -> str:
    """A hash of everything that determines a reference's log-probs besides the tokens.

    Args:
        directories: the model's, and its adapter's. The contents of weights and configs count, not
            their paths.
        settings: other settings that change log-probs, such as dtype and precision.
    """
    digest = blake2b(repr((FORMAT_VERSION, *settings)).encode(), digest_size=16)
    for directory in directories:
        names = {"config.json", "adapter_config.json"} & {p.name for p in directory.iterdir()}
        weights = (path.name for path in directory.glob("*.safetensors"))
        for name in sorted([*names, *weights]):
            with (directory / name).open("rb") as file:
                content = file_digest(file, lambda: blake2b(digest_size=16))
            digest.update(f"{name} {content.hexdigest()}".encode())
    return digest.hexdigest()
