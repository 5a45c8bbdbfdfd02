"""The clients' end: handshakes, connections and what they are held to."""
