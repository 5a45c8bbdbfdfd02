"""Each file that an option names is read by the same rules."""

import os

import pytest
import websockets
from certificates import Authority
from service import Service, refusal

HTTP = ("--backend=http", "--messageuri=http://127.0.0.1:9/")
BOM = b"\xef\xbb\xbf"
TEXTS = {
    "config": b"max_message_size = 3\n",
    "callback_token_file": b"a-token-0123456789\n",
    "log_config": b'{"version": 1, "root": {"handlers": ["stderr"]},'
                  b' "handlers": {"stderr": {"class": "logging.StreamHandler"}}}',
    "webhook_secret_file": b"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n",
    "backend_headers_file": b"X-Key: abc\n",
}
PEM = ("tls_cert", "tls_key", "callback_tls_cert", "callback_tls_key",
       "callback_client_ca", "backend_ca", "backend_cert", "backend_key")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority")).server()


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.gen_test
async def test_byte_order_mark_is_left_out(io_loop, tmp_path, name):
    """Some Windows editors write one."""
    path = tmp_path / "file"
    path.write_bytes(BOM + TEXTS[name].replace(b"\n", b"\r\n"))
    flags = HTTP if name != "config" else ()
    auto = {"SOCKETDOCK_LOG_FORMAT": "auto"}  # required by --log_config
    async with Service(*flags, f"--{name}={path}", environment=auto) as service:
        async with websockets.connect(service.ws_url):
            pass


@pytest.mark.parametrize("name", [*TEXTS, *PEM])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "null", "missing"])
def test_special_files_are_rejected_at_once(tmp_path, certificate, name, kind):
    """None that could block is opened; status 1, since that may change."""
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("device", "null"):
        path.symlink_to("/dev/zero" if kind == "device" else "/dev/null")
    also = []
    if name.endswith("_key"):
        also.append(f"--{name.removesuffix('_key')}_cert={certificate.cert}")
    if name.startswith("callback_") and name != "callback_token_file":
        also.append("--callbackport=0")
    if name == "callback_client_ca":
        also.append(f"--callback_tls_cert={certificate.both}")
    why = {"folder": "Is a directory", "missing": "No such file or directory"}
    line = refusal(*HTTP, *also, f"--{name}={path}", status=1)
    assert str(path) in line
    assert line.endswith(f": {why.get(kind, 'it is not a regular file')}")


@pytest.mark.gen_test
async def test_dev_null_selects_no_options_file(io_loop, tmp_path):
    """`--config=/dev/null` overrides the file that the environment names."""
    environment = {"SOCKETDOCK_CONFIG": str(tmp_path / "missing")}
    async with Service("--config=/dev/null", environment=environment) as service:
        async with websockets.connect(service.ws_url):
            pass
