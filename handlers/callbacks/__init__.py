"""The backend's end: send, disconnect and info over HTTP."""
