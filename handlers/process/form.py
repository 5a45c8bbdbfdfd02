"""Says in which form the relay runs: pure Python, or compiled (`make compile`).

setup.py compiles the modules that messages pass. Beside the library with their code it
records the sources, since Python would run the library even if they have changed.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Literal

from tornado.options import Error as OptionError

LIBRARY = "socketdock__mypyc"  # that of setup.py

Form = Literal["compiled", "pure"]


def form() -> Form:
    """Return the form of the modules that were imported."""
    return "compiled" if LIBRARY in sys.modules else "pure"


def require_unchanged_sources() -> None:
    """Raise `OptionError` if a source has changed since it was compiled."""
    path = getattr(sys.modules.get(LIBRARY), "__file__", None)
    if path is None:
        return
    library = Path(path)
    compiled = json.loads(library.with_suffix(".json").read_bytes())
    for name, digest in compiled.items():
        source = (library.parent / name).read_bytes()
        if hashlib.sha256(source).hexdigest() != digest:
            raise OptionError(
                f"{name} has changed since it was compiled: run 'make compile', or"
                " 'make pure' to do without compiled modules"
            )
