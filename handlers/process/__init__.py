"""The process itself: options, log, signals, systemd."""
