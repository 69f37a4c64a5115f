"""Finding a name that a person typed."""

import difflib
from collections.abc import Iterable

from kvsim.errors import UsageError


def plain(name: str) -> str:
    """Return a name as it is compared: lower case, blanks and underscores as dashes."""
    return name.strip().lower().replace("_", "-").replace(" ", "-")


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> UsageError:
    """Return the error for a name that is not in the table: the closest matches, or all names if none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(plain(name), names, n=5, cutoff=0.55)
    offer = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(names)}"
    return UsageError(f"unknown {kind} {name!r}; {offer}{hint}")
