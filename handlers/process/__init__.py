"""The process: options, log, signals, event loop, systemd, start and exit."""
