"""Routes: which function is invoked for an event.

`--route_selection` takes a route key out of each message. Keys that no route has are
`$default`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from tornado.options import Error as OptionError
from tornado.options import options

from backends.apigateway.documents import parsed
from backends.target import Target

CONNECT, DISCONNECT, DEFAULT = "$connect", "$disconnect", "$default"
PREDEFINED = (CONNECT, DISCONNECT, DEFAULT)


# One property or a path, as `$request.body.a.b` or `${request.body.a.b}`.
NAMES = r"([^{}\[\]\s]+)"
SELECTION = re.compile(rf"\$(?:request\.body\.{NAMES}|\{{request\.body\.{NAMES}\}})")


class Routes:
    """The functions by route key, and the selection of a key.

    `function` is the usual one. `table` has one for each key; a predefined key without
    one has no route. `path` leads to the member of a message that has its key.
    """

    def __init__(
        self, function: Target, table: Mapping[str, Target], path: Sequence[str]
    ) -> None:
        self.function = function
        self._table = table
        self._path = path
        self._selectable = frozenset(table).difference(PREDEFINED)

    @property
    def connect(self) -> Target | None:
        """The function of `$connect`; None: every client is accepted."""
        return self._table.get(CONNECT)

    @property
    def disconnect(self) -> Target | None:
        """The function of `$disconnect`; None: it is not invoked."""
        return self._table.get(DISCONNECT)

    @property
    def named(self) -> Iterator[tuple[str, Target]]:
        """All functions, each with where it is named in the options."""
        if self.function in self._table.values():
            yield "--functionuri", self.function
        for key, target in self._table.items():
            if target is not self.function:
                yield f"--routes: {key}", target

    def target_of(self, key: str) -> Target | None:
        """Return the function of a route; None: there is no `$default`."""
        return self._table.get(key)

    def key_of(self, message: str | bytes) -> str:
        """Return the route key of a message; a client cannot select a predefined one.

        `$default` if the message is binary or no JSON, or has no key of a route.
        """
        if isinstance(message, bytes) or not self._selectable:
            return DEFAULT
        try:
            value = parsed(message.encode())
        except ValueError:
            return DEFAULT
        for name in self._path:
            if not isinstance(value, dict):
                return DEFAULT
            value = value.get(name)
        if isinstance(value, str) and value in self._selectable:
            return value
        return DEFAULT


def make_routes() -> Routes:
    """Make the routes from the options. Raises `OptionError`."""
    if not options.functionuri:
        raise OptionError("--backend=apigateway needs --functionuri")
    function = function_target("--functionuri", options.functionuri)
    table = dict.fromkeys(PREDEFINED, function)
    named: set[str] = set()
    for item in options.routes:
        key, equals, url = item.partition("=")
        where = f"--routes: {key}"
        if not key or key in named:
            raise OptionError(f"{where}: each route needs one key")
        if key.startswith("$") and key not in PREDEFINED:
            raise OptionError(
                f"{where}: the only keys that begin with $ are {', '.join(PREDEFINED)}"
            )
        named.add(key)
        if url:
            table[key] = function_target(where, url)
        elif not equals:
            table[key] = function
        elif key in PREDEFINED:
            del table[key]
        else:
            raise OptionError(f"{where}: the URL is missing")
    return Routes(function, table, selection_path(options.route_selection))


def selection_path(expression: str) -> list[str]:
    """Return the names of the members that lead to the route key.

    Raises `OptionError` if the expression is not supported.
    """
    match = SELECTION.fullmatch(expression)
    path = (match[1] or match[2]).split(".") if match is not None else [""]
    if "" in path:
        raise OptionError(
            f"--route_selection={expression} is not like $request.body.action or"
            " $request.body.message.kind"
        )
    return path


def function_target(where: str, url: str) -> Target:
    """Parse the URL of a function. Raises `OptionError` with `where` it was given."""
    try:
        return Target.parse(url)
    except ValueError as error:
        # Shown without a password or a key that it may contain.
        shown = re.sub(r"(?s)//.*@", "//", url).partition("?")[0]
        raise OptionError(f"{where}={shown}: {error}") from None
