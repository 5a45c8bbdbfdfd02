"""Names of options: their records by any spelling, and the nearest known name."""

from typing import Any

from tornado.options import options

# The spellings of the existing SocketDock's deployments.
OTHER_SPELLINGS = {
    "message-uri": "messageuri",
    "disconnect-uri": "disconnecturi",
    "connect-uri": "connecturi",
    "endpoint": "externalhostandport",
    "log-level": "logging",
}

# Metavars of options whose values are never shown.
SECRET_METAVARS = ("TOKENS", "SECRETS")


def option_of(name: str) -> Any:
    """Return Tornado's record of an option by any of its spellings, or None."""
    name = name.replace("_", "-")
    return options._options.get(OTHER_SPELLINGS.get(name, name))


def is_secret(option: Any) -> bool:
    """Whether the values of `option` must not be shown."""
    return option is not None and option.metavar in SECRET_METAVARS


def nearest(name: str, start: str = "--") -> str:
    """Return "; did you mean ...?" for a similar option, or nothing.

    `start` is what precedes the name there. Keeps the case of `name`.
    """
    known = {option.replace("-", "_"): option.replace("-", "_")
             for option in options._options}
    known |= {other.replace("-", "_"): other for other in OTHER_SPELLINGS}
    given = name.lower().replace("-", "_")
    longer = [option for option in known if option.startswith(f"{given}_")]
    import difflib

    near = difflib.get_close_matches(given, longer, n=1, cutoff=0.0) or (
        difflib.get_close_matches(given, known, n=1)
    )
    if not near:
        return ""
    meant = near[0].upper() if name.isupper() else known[near[0]]
    return f"; did you mean {start}{meant}?"
