"""The relay's two ends: clients' WebSockets and the backend's callbacks."""
