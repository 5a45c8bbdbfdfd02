"""Says in which form the relay runs: pure Python, or compiled (`make compile`).

setup.py compiles the modules that messages pass. Beside the library with their code it
records the sources, since Python would run the library even if they have changed.
"""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Literal

LIBRARY = "socketdock__mypyc"  # that of setup.py

Form = Literal["compiled", "pure"]


def form() -> Form:
    """Return the form of the modules that were imported."""
    return "compiled" if LIBRARY in sys.modules else "pure"


def require_unchanged_sources() -> None:
    """Exit with status 2 if a source has changed since it was compiled.

    To be called before compiled modules are imported: they may not fit the others.
    """
    found = importlib.util.find_spec(LIBRARY)
    if found is None or found.origin is None:
        return
    library = Path(found.origin)
    name = _changed(library)
    if name is not None:
        print(
            f"socketdock: {name} has changed since it was compiled: run"
            " 'make compile', or 'make pure' to do without compiled modules",
            file=sys.stderr,
        )
        sys.exit(2)


def _changed(library: Path) -> str | None:
    """Return the name of a source that is not as it was compiled, if there is one.

    A source may be missing after a change of branches, and the record of all of them in
    an incomplete copy.
    """
    record = library.with_suffix(".json")
    if not record.exists():
        return record.name
    for name, digest in json.loads(record.read_bytes()).items():
        source = library.parent / name
        if (
            not source.exists()
            or hashlib.sha256(source.read_bytes()).hexdigest() != digest
        ):
            return str(name)
    return None
