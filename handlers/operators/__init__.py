"""The operators' end: status, metrics and the console."""
