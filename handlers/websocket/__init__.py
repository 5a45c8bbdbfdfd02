"""RFC 6455 on a socket."""
