"""The callbacks of AWS's SDKs, `/@connections/<id>`, for `--backend=apigateway`.

`routes` has the handlers, `access` who may call, `sigv4` verifies signatures, and
`errors` words failures as AWS does. They are imported only with this backend.
"""

from typing import TYPE_CHECKING

from tornado.options import Error as OptionError
from tornado.options import define, options

if TYPE_CHECKING:
    from handlers.callbacks.apigateway.sigv4_keys import SigningKeys

define("sigv4_keys_file", type=str, metavar="PATH",
       help="file of key ids and secrets, one pair per line; each callback to "
            "/@connections then needs an AWS signature (SigV4) by one of them; re-read "
            "on SIGHUP")


def make_signing_keys() -> "SigningKeys | None":
    """Read the keys; None without the option. Raises `OptionError`."""
    if options.sigv4_keys_file is None:
        return None
    if options.backend != "apigateway":
        raise OptionError("--sigv4_keys_file needs --backend=apigateway")
    from handlers.callbacks.apigateway.sigv4_keys import SigningKeys

    return SigningKeys(options.sigv4_keys_file)
