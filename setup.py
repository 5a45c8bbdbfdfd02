"""What ships: two modules, two packages and the files of `conf/`."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent


def version() -> str:
    """`__version__` of socketdock.py, which can't be imported before it is set up."""
    source = (HERE / "socketdock.py").read_text("utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, flags=re.MULTILINE)
    assert found is not None, "socketdock.py has no __version__"
    return found[1]


setup(
    name="socketdock",
    version=version(),
    description="Lets WebSocket clients talk to backends that speak only HTTP",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
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
    # Bare names in site-packages: meant for an environment of its own.
    py_modules=["socketdock", "socketdock_options"],
    packages=["backends", "backends.http", "handlers"],
    data_files=[
        (
            "share/socketdock/conf",
            [
                "conf/compose.yaml",
                "conf/haproxy.cfg",
                "conf/nginx.conf",
                "conf/socketdock.conf",
                "conf/socketdock.service",
                "conf/supervisord.conf",
            ],
        )
    ],
    entry_points={"console_scripts": ["socketdock=socketdock:main"]},
    install_requires=[
        "tornado>=6.6,<6.7",  # handlers.protocol stands on its inner parts
        "httptools>=0.6.1,<1",
        "orjson>=3.9,<4",
        "aiohappyeyeballs>=2.4,<3",
        "uvloop>=0.19,<1; sys_platform != 'win32'"
        " and platform_python_implementation == 'CPython'",
    ],
    extras_require={
        "test": [
            "pytest>=8,<10",  # pytest-tornado's hook marks are gone from 10 on
            "pytest-tornado==0.8.1",
            "setuptools>=77,<82",  # pytest-tornado imports pkg_resources
            "websockets>=13",
            "websocket-client>=1.8",
            "aiohttp>=3.10,<4",
            "flask>=3,<4",
            "cryptography",
            "hypothesis>=6.100,<7",
            "kosoku>=0.1,<0.2",  # Autobahn's cases
            "schemathesis>=4,<5",  # the OpenAPI document against the relay
            "pyyaml>=6,<7",  # conf/compose.yaml
            "standardwebhooks>=1.1,<2",
            "supervisor>=4.3,<5",
            "ruff",
            "mypy",
            "types-setuptools",
        ],
        "bench": [
            "aiohttp>=3.10,<4",
            "matplotlib>=3.8,<4",
            "py-spy",
        ],
    },
)
