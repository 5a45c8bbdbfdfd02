"""docs/guides: the commands and the code are those of the examples, which are run.

`reply_examples_test` runs each example by the commands in its head, `balancer_test`
the proxies by their files, `acapy_transport_test` the transport of the mediators.
"""

import re
import subprocess

import pytest
import yaml
from programs import program
from reply_examples_test import FOLDER, LAMBDA_URL, commands
from service import PROJECT

pytestmark = pytest.mark.once

GUIDES = PROJECT / "docs" / "guides"
CLIENT = ".venv/bin/python examples/client.py Hello"
EXAMPLES = {
    "aws-lambda": "reply_lambda.py",
    "cloudflare-worker": "reply_worker.mjs",
    "django": "reply_django.py",
    "express": "express_backend/reply.mjs",
    "fastapi": "reply_fastapi.py",
    "flask": "reply_flask.py",
    "go": "reply.go",
    "php": "reply.php",
}
PROXIES = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg", "caddy": "Caddyfile"}

each_guide = pytest.mark.parametrize("name", EXAMPLES)


def page(name: str) -> str:
    return (GUIDES / f"{name}.md").read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks in a language, each without its last line break."""
    return re.findall(rf"^```{language}\n(.*?)\n```$", text, flags=re.M | re.S)


def lines_of(block: str) -> list[str]:
    """Return the commands of a block, continued ones as one line."""
    return block.replace("\\\n", "").splitlines()


def words(command: str) -> list[str]:
    return command.split()


@pytest.mark.parametrize(
    "path", sorted(GUIDES.glob("*.md")), ids=lambda path: path.stem
)
def test_guide_begins_with_a_command_and_is_in_the_index(path):
    """A reader finds it from docs/README.md, and can begin at once."""
    assert re.match(r"# .+\n\n```sh\n", path.read_text("utf-8"))
    index = (PROJECT / "docs" / "README.md").read_text("utf-8")
    assert f"(guides/{path.name})" in index
    assert path.stem in {*EXAMPLES, "aca-py-and-credo", "proxies"}


@each_guide
def test_guide_has_the_commands_of_its_example(name):
    """Those that start the backend, then the relay's, then the client's."""
    *start, relay, client = blocks(page(name), "sh")
    started = [line for block in start for line in lines_of(block)]
    *wanted, wanted_relay = commands(EXAMPLES[name])
    if name == "aws-lambda":  # it is deployed by commands that need an account
        assert f"--handler={EXAMPLES[name].removesuffix('.py')}.handler" in start[0]
        assert LAMBDA_URL in relay
    else:
        assert [words(line) for line in started] == [words(line) for line in wanted]
    assert words(lines_of(relay)[0]) == words(wanted_relay)
    assert client == CLIENT


@each_guide
def test_guide_has_the_code_of_its_example(name):
    """All of it, except the comment at its beginning."""
    code = (FOLDER / EXAMPLES[name]).read_text("utf-8")
    lines = code.splitlines()
    first = lines.pop(0) if lines[0] == "<?php" else None
    while not lines[0] or lines[0].startswith(("#", "//")):
        lines.pop(0)
    shown = "\n".join([first, *lines] if first else lines)
    language = EXAMPLES[name].rpartition(".")[2]
    names = {"py": "python", "mjs": "js"}
    assert blocks(page(name), names.get(language, language)) == [shown]


def test_proxies_are_started_as_their_files_say():
    """Each by the command at the beginning of its file."""
    started, *relays = blocks(page("proxies"), "sh")
    for (name, file), command in zip(
        PROXIES.items(), started.splitlines(), strict=True
    ):
        assert command.startswith(f"{name} ")
        head = (PROJECT / "conf" / file).read_text("utf-8")
        assert f"#     {command}\n" in head
        ports = re.findall(r"--bindport=(\d+)", "\n".join(relays))
        assert set(ports) <= set(re.findall(r"127\.0\.0\.1:(\d+)", head))


def test_traefik_checks_what_the_relays_serve():
    """Only the names in the file are checked: there is no Traefik to run."""
    (text,) = blocks(page("proxies"), "yaml")
    http = yaml.safe_load(text)["http"]
    (router,) = http["routers"].values()
    assert router["rule"] == "Path(`/ws`)"
    balancer = http["services"][router["service"]]["loadBalancer"]
    assert len(balancer["servers"]) == 2
    assert balancer["healthCheck"]["path"] == "/readyz"


def test_mediators_are_balanced_by_a_rule_of_haproxy(tmp_path):
    """It accepts the lines in the page."""
    haproxy = program("haproxy", "haproxy", "/usr/sbin/haproxy")
    (rules,) = blocks(page("aca-py-and-credo"), "haproxy")
    path = tmp_path / "haproxy.cfg"
    path.write_text(
        "defaults\n    mode http\n"
        "    timeout connect 2s\n    timeout client 9s\n    timeout server 9s\n"
        "frontend f\n    bind 127.0.0.1:9\n    default_backend mediators\n"
        f"backend mediators\n{rules}\n    server m 127.0.0.1:9\n"
    )
    checked = subprocess.run(
        [haproxy, "-c", "-f", path],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_relay_of_the_mediators_has_the_options_of_the_example():
    """And nothing more than a key in the URLs of callbacks."""
    (block,) = blocks(page("aca-py-and-credo"), "sh")
    relay = lines_of(block)[1].split()
    (wanted,) = (
        line for line in commands("acapy_transport.py") if "bin/socketdock" in line
    )
    assert set(relay) - set(wanted.split()) == {"--callback_capability"}
    assert set(wanted.split()) <= set(relay)
