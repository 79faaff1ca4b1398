"""A cache on disk of the reference's log-probs, shared by all runs with the same reference.

A cache directory has one folder per reference (`reference_fingerprint`), and in it one file per
process that has written there, of records of a key (`batches/collate.py`), a log-prob and a
checksum, which includes the folder's name. Files are only appended to: processes do not interfere
with each other. What a crash or damage has left incomplete, or what belongs to another reference,
has a wrong checksum and is computed again.

A run that resumes finds more in the cache than it found the first time. So that it gets the same
bits, a log-prob that is in the cache is always taken from there, and missing ones are computed by
the forward that would have computed the whole batch.
"""

import errno
import math
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b, file_digest
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

from kto_lightning.batches.collate import KEY_BYTES
from kto_lightning.batches.types import Logps, PackedBatch
from kto_lightning.distributed import is_first_rank
from kto_lightning.errors import KTOError
from kto_lightning.models.reference import Reference

FORMAT_VERSION = 2
RECORD = np.dtype([("key", f"V{KEY_BYTES}"), ("logp", "<f8"), ("checksum", "<u4")])
_CHECKED_BYTES = KEY_BYTES + 8


class ReferenceCache:
    """The log-probs of one reference, in memory and on disk.

    Args:
        directory: the folder of this reference; created with the first log-prob.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._salt = crc32(self._directory.name.encode())
        self._file = self._directory / f"{uuid.uuid4().hex}.logps"
        self._logps: dict[bytes, float] = {}
        self._offsets: dict[str, int] = {}
        self._warned: set[str] = set()
        self.refresh()

    def __len__(self) -> int:
        return len(self._logps)

    def refresh(self) -> None:
        """Read the records that other processes have added; warn of those that are damaged."""
        for path in sorted(self._directory.glob("*.logps")):
            try:
                content = self._read(path)
            except OSError as error:
                self._warn(f"{path} cannot be read: {error.strerror}. Its log-probs")
                continue
            # The last record may still be incomplete: the next refresh reads it again.
            complete = len(content) - len(content) % RECORD.itemsize
            found = self._valid_records(content[:complete])
            num_damaged = complete // RECORD.itemsize - len(found)
            if num_damaged:
                self._warn(f"{path} is damaged: {num_damaged} of its log-probs")
            self._offsets[path.name] = self._offsets.get(path.name, 0) + complete
            self._logps.update(found)

    def _read(self, path: Path) -> bytes:
        """What has been added to a file."""
        if not path.is_file():  # opening a FIFO would wait for a writer
            raise OSError(errno.EINVAL, "not a file")
        with path.open("rb") as file:
            file.seek(self._offsets.get(path.name, 0))
            return file.read()

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
        finite = {key: logp for key, logp in new.items() if math.isfinite(logp)}
        self._append(b"".join(map(self._record, finite.keys(), finite.values())))

    def check_writable(self) -> None:
        """Check that log-probs can be stored, before a model is loaded to compute them.

        Raises:
            KTOError: if they cannot.
        """
        self._append(b"")

    def _append(self, records: bytes) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab", buffering=0) as file:
                while records:  # a disk that is almost full takes a part, and refuses the next
                    records = records[file.write(records) :]
        except OSError as error:
            raise KTOError(
                f"--model.reference_cache: {self._file} cannot be written: {error.strerror}. Make "
                "room, or remove the option."
            ) from error

    def _record(self, key: bytes, logp: float) -> bytes:
        checked = key + np.float64(logp).tobytes()
        return checked + np.uint32(crc32(checked, self._salt)).tobytes()

    def _valid_records(self, content: bytes) -> dict[bytes, float]:
        records = np.frombuffer(content, dtype=RECORD)
        found = {}
        for start, record in zip(range(0, len(content), RECORD.itemsize), records, strict=True):
            checked = content[start : start + _CHECKED_BYTES]
            if crc32(checked, self._salt) == record["checksum"]:
                found[checked[:KEY_BYTES]] = float(record["logp"])
        return found

    def _warn(self, problem: str) -> None:
        if problem not in self._warned and is_first_rank():
            print(f"warning: the reference cache {problem} are computed again.", file=sys.stderr)
        self._warned.add(problem)


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
            cache.check_writable()
            self.reference: Reference | None = make_reference()
            self.description = (
                f"log-probs from the cache (it has {len(cache):,}), the others from "
                f"{self.reference.description}"
            )
            return
        known = cache.num_known(keys)
        (is_incomplete,) = agree([known < len(keys)])
        if is_incomplete:
            cache.check_writable()
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
        found = self._find(batch, matched=matched, mismatched=mismatched)
        is_incomplete = found is None
        if self.reference is not None:
            (is_incomplete,) = self._agree([is_incomplete])
        if is_incomplete:
            self._compute(batch, matched=matched, mismatched=mismatched)
            found = self._find(batch, matched=matched, mismatched=mismatched)
        assert found is not None
        return found

    def _find(self, batch: PackedBatch, *, matched: bool, mismatched: bool) -> Logps | None:
        """The log-probs of the batch from the cache; None if one is missing."""
        found = Logps()
        for wanted, name in ((matched, "matched"), (mismatched, "mismatched")):
            if not wanted:
                continue
            logps = self.cache.find(getattr(batch, f"{name}_keys"))
            if logps is None:
                return None
            values = torch.tensor(logps, dtype=torch.float32)
            setattr(found, name, values.to(batch.weight.device, non_blocking=True))
        return found

    def _compute(self, batch: PackedBatch, *, matched: bool, mismatched: bool) -> None:
        """Score with the model, into the cache."""
        if self.reference is None:
            raise KTOError(
                "the reference cache lost log-probs that it had when the run began. Resume with "
                "--ckpt_path last: missing ones are computed then."
            )
        computed = self.reference.logps(batch, matched=matched, mismatched=mismatched)
        keys: list[bytes] = []
        logps: list[float] = []
        if computed.matched is not None and batch.matched_keys is not None:
            keys += batch.matched_keys
            logps += computed.matched.tolist()
        if computed.mismatched is not None and batch.mismatched_keys is not None:
            keys += batch.mismatched_keys
            logps += computed.mismatched.tolist()
        self.cache.add(keys, logps)


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
