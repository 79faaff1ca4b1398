"""What a reference log-prob is filed under: the tokens it is the log-prob of."""

from hashlib import blake2b

import numpy as np
from jaxtyping import Int

KEY_BYTES = 16


def pair_key(
    prompt_ids: Int[np.ndarray, " prompt"], completion_ids: Int[np.ndarray, " completion"]
) -> bytes:
    """128 bits of BLAKE2b over a prompt's and a completion's token ids, as they are run.

    The prompt's length stands before both, so that no other cut of the same tokens has this key.
    """
    digest = blake2b(np.int64(len(prompt_ids)).tobytes(), digest_size=KEY_BYTES)
    digest.update(np.ascontiguousarray(prompt_ids, dtype=np.int64).tobytes())
    digest.update(np.ascontiguousarray(completion_ids, dtype=np.int64).tobytes())
    return digest.digest()
