"""What tells a data set from another, and from the same in another order: every number of a run depends on that."""

import hashlib

import numpy as np


def digest_of(*parts: np.ndarray | str) -> str:
    """A sha256 of samples, labels and names in their order, in hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode(errors="surrogateescape") if isinstance(part, str) else np.ascontiguousarray(part))
    return found.hexdigest()
