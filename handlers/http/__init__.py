"""The HTTP server below both ends."""
