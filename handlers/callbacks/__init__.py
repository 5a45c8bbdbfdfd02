"""The callback side: send, disconnect and describe over HTTP."""
