"""The client side: handshakes, connections, and their limits."""
