"""International host names, as DNS has them.

Such names stand in URLs that options give, for backends and for ourselves, so this
module imports nothing of the project.
"""

# In which IDNA 2003, as in Python, and IDNA 2008, as in browsers, name other hosts.
AMBIGUOUS_IN_IDNA = "\u00df\u03c2\u200c\u200d"


def encoded_host(host: str) -> str:
    """An international host name as DNS has it (`xn--…`).

    Raises `ValueError` where that cannot be told, with what to write instead.
    """
    if host.isascii():
        return host
    if not set(AMBIGUOUS_IN_IDNA).isdisjoint(host):
        raise ValueError("its host has several encodings; give the one with xn--")
    try:
        return host.encode("idna").decode("ascii")
    except UnicodeError:
        raise ValueError("its host cannot be encoded; give it with xn--") from None
