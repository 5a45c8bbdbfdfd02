"""What the commands of `socketdock` do, each with the parts that it creates.

`service` has the relay itself, `servers` its HTTP servers; `check` and `health` have
the commands of these names.
"""
