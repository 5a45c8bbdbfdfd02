"""What soak.py is made of.

`answers` is how a backend answers, `visits` are clients of every kind, `callers`
call back, `stalls` says when nobody ran, `books` compares what all of them saw.
"""
