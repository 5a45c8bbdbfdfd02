"""Limits how many log lines are written.

`LogLimit` passes the first of many equal lines, and counts the others; every log
handler has it as a filter. `LineQuota` is for lines with their own limit or summary.
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
# Events with at most one line per connection that is recorded nowhere else, and the
# summaries.
NEVER_COUNTED = frozenset({"disconnect_failed", "repeat"})

_Key = tuple[str, int, str]  # logger, level, template


class LineQuota:
    """Allows `lines` log lines per `interval` (seconds), from the first one on.

    The caller counts the others itself, if at all.
    """

    __slots__ = ("_interval", "_left", "_lines", "_restart_at")

    def __init__(self, lines: int, interval: float) -> None:
        self._lines = lines
        self._interval = interval
        self.restart()

    def restart(self) -> None:
        """Start a new interval with the next line."""
        self._left = self._lines
        self._restart_at = float("inf")  # by `time.monotonic()`

    def allow(self) -> bool:
        """Whether one more line may be logged now; counts it."""
        now = time.monotonic()
        if now >= self._restart_at:
            self.restart()
        if self._left == self._lines:
            self._restart_at = now + self._interval
        if not self._left:
            return False
        self._left -= 1
        return True


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
        if "_allowed" not in fields:
            key = self._key(record)
            self._seen[key] = number = self._seen.get(key, 0) + 1
            fields["_allowed"] = number <= self._lines
        allowed: bool = fields["_allowed"]
        return allowed

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
        self.log_summary()
        self.begin()

    def log_summary(self) -> None:
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
        self.log_summary()
