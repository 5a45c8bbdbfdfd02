"""The parts of soak.py.

`answers` has the backend's responses, `visits` the clients, `callers` send callbacks,
`pulse` measures round trips, `books` compares what all of them saw.
"""
