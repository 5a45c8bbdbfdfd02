"""Callbacks for the connections of other instances (`--peer_address`).

`sharing` makes the parts from the options. `forward` sends a callback to the instance
that has the connection, `received_hops` takes it there, and `hops` signs and verifies.
"""
