"""What soak.py is made of.

`answers` is how a backend answers, `visits` are clients of every kind, `callers`
call back, `pulse` says who has seen what by when, `books` compares what all of them
saw.
"""
