"""Measures the cost of a message: SocketDock and other relays for the same task.

    make bench ARGS="--modes=up,echo --sizes=1024 --rounds=5"

`wire` makes the bytes, `load` has clients and backend, `modes` runs and measures them,
`relays` starts the relays, `results` keeps those of each machine, `report` makes tables
and plots, `comparison` compares two checkouts, `crowd` shows many idle clients.
docs/performance.md explains the figures.
"""
