"""The price of a message: SocketDock beside the relays that one would otherwise run.

    make bench ARGS="--modes=up,echo --sizes=1024 --rounds=5"

`wire` makes the bytes once, `load` plays clients and backend, `modes` says what
they do and takes the figures, `relays` starts what is measured, `report` makes
tables and a plot, `verdict` compares two checkouts. docs/performance.md tells what
it all means.
"""
