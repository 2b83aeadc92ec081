"""Looking at what the user names, where that may not be allowed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from utils import UsageError


@contextlib.contextmanager
def reading(option: str, path: Path) -> Iterator[None]:
    """A context in which an OSError raises UsageError that names the option; ``path`` is named where the system names no file.

    ``Path.exists``, ``is_dir`` and ``is_file`` are False where nothing is there, and raise where that cannot be known: below a
    folder that this user may not enter, say.
    """
    try:
        yield
    except OSError as error:
        needed = "; this user must be allowed to read it, and to enter every folder above it"
        words = f"{option}: {error.filename or path} cannot be read ({error.strerror or error})"
        raise UsageError(words + (needed if isinstance(error, PermissionError) else "")) from None
