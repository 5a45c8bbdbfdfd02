"""LogLimit: logs the first of many equal lines, and counts the others.

`handlers.process.logs` adds it to every log handler as a filter.
"""

import asyncio
import logging
import time

LINES = 20  # of one template that are logged per interval; others are counted
INTERVAL = 60.0  # seconds
MAX_TEMPLATES = 200  # counted separately per interval; all others together
MAX_TEMPLATE = 200  # characters of a template that are compared

# Events below `warning` that peers can cause any number of times.
OF_PEERS = frozenset({"fail", "stall"})
# At most one per connection, and recorded nowhere else; and the summaries.
NEVER_COUNTED = frozenset({"disconnect_failed", "repeat"})

_Key = tuple[str, int, str]  # logger, level, template


class LogLimit(logging.Filter):
    """Passes the first lines of each template, and counts the others.

    A template is a record's text before its arguments are inserted. Limits warnings,
    errors and the events `OF_PEERS`; not other lines, nor a logger whose level is
    `debug`.
    """

    def __init__(self, lines: int = LINES, interval: float = INTERVAL) -> None:
        super().__init__()
        self._lines = lines
        self._interval = interval  # seconds
        self._seen: dict[_Key, int] = {}
        self._since = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log the record; the same result for each handler that asks."""
        fields = record.__dict__
        event = fields.get("event")
        if record.levelno < logging.WARNING and event not in OF_PEERS:
            return True
        if event in NEVER_COUNTED:
            return True
        if logging.getLogger(record.name).isEnabledFor(logging.DEBUG):
            return True
        if "_told" not in fields:
            key = self._key(record)
            self._seen[key] = number = self._seen.get(key, 0) + 1
            fields["_told"] = number <= self._lines
        told: bool = fields["_told"]
        return told

    def _key(self, record: logging.LogRecord) -> _Key:
        message = record.msg
        text = message if isinstance(message, str) else type(message).__name__
        key = (record.name, record.levelno, text[:MAX_TEMPLATE])
        if key in self._seen or len(self._seen) < MAX_TEMPLATES:
            return key
        return (record.name, record.levelno, "(several)")

    def begin(self) -> None:
        """Log a summary after each interval, on the running loop, until `close()`."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._interval, self._on_time)

    def _on_time(self) -> None:
        self.sum_up()
        self.begin()

    def sum_up(self) -> None:
        """Log how many lines were only counted, and start a new interval."""
        seen, self._seen = self._seen, {}
        since, self._since = self._since, time.monotonic()
        for (name, level, template), number in seen.items():
            unwritten = number - self._lines
            if unwritten > 0:
                logging.getLogger(name).log(
                    level,
                    "%d more like this in %.0f s: %s",
                    unwritten,
                    self._since - since,
                    template,
                    extra={"event": "repeat", "count": unwritten},
                )

    def close(self) -> None:
        """Log the last summary, and stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.sum_up()
