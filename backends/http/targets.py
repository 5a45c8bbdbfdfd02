"""The URLs of events, from the options."""

import re

from tornado.options import Error as OptionError
from tornado.options import options

from backends import Relay
from backends.breaker import breaker_settings
from backends.http.deliveries import delivery_limits
from backends.target import Target


def make_targets(relay: Relay) -> tuple[Target, Target | None, Target | None]:
    """Return the targets of message, disconnect and connect events, from the options.

    Raises `OptionError` for an invalid URL, and for options that conflict.
    """
    message_target = _target_of("messageuri")
    if message_target is None:
        raise OptionError("--backend=http needs --messageuri")
    if relay.callback_url is None:
        raise OptionError(
            "--backend=http needs --externalhostandport, since callbacks are bound"
            " to a wildcard address"
        )
    delivery_limits()  # checks these options, too
    breaker_settings()
    return message_target, _target_of("disconnecturi"), _target_of("connecturi")


def _target_of(option: str) -> Target | None:
    """Parse the URL in an option. Raises `OptionError` if it is invalid."""
    if not options[option]:
        return None
    try:
        return Target.parse(options[option])
    except ValueError as error:
        # Shown without a password or a key that it may contain.
        shown = re.sub(r"(?s)//.*@", "//", options[option]).partition("?")[0]
        raise OptionError(f"--{option}={shown}: {error}") from None
