"""Measures the cost of a message: SocketDock and other relays for the same task.

    make bench ARGS="--modes=up,echo --sizes=1024 --rounds=5"

`wire` makes the bytes, `load` has clients and backend, `modes` runs and measures them,
`relays` starts the relays, `report` makes tables and a plot, `comparison` compares two
checkouts. docs/performance.md explains the figures.
"""
