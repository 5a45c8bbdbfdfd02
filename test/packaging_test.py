"""The installation has exactly what setup.py lists."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
from project import installation, library, source_distribution, wheel
from service import PROJECT

MODULES = {"socketdock.py"}
PACKAGES = ("backends", "handlers")


@pytest.fixture
def names(tmp_path_factory):
    """Names of the files in the wheel."""
    with zipfile.ZipFile(wheel(tmp_path_factory.getbasetemp())) as archive:
        return set(archive.namelist())


def test_wheel_has_two_modules_and_two_packages_with_all_their_modules(names):
    """Top-level names in site-packages: these, without `test` and `bench`."""
    shipped = {
        name
        for name in names
        if not name.partition("/")[0].endswith((".dist-info", ".data"))
    }
    modules = {
        file.relative_to(PROJECT).as_posix()
        for package in PACKAGES
        for file in (PROJECT / package).rglob("*.py")
    }
    page = {
        file.relative_to(PROJECT).as_posix()
        for file in PROJECT.glob("handlers/operators/console/page/*")
    }
    assert len(page) > 5
    typed = {f"{package}/py.typed" for package in PACKAGES}
    documents = {
        "handlers/callbacks/openapi.json",
        "handlers/callbacks/apigateway/openapi.json",
    }
    assert shipped == MODULES | modules | page | documents | typed


@pytest.mark.long
def test_package_has_types_for_backend_authors(tmp_path, tmp_path_factory):
    """mypy reads the types of the installed `backends` (PEP 561)."""
    prefix = installation(tmp_path_factory.getbasetemp())
    (tmp_path / "mine.py").write_text(BACKEND)
    mypy = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir=cache", "mine.py"],
        cwd=tmp_path,
        # As mypy finds a package of site-packages, and of no other folder.
        env={**os.environ, "PYTHONPATH": library(prefix)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert mypy.stdout.splitlines() == [
        'mine.py:6: error: Argument 1 to "send" of "Connection" has incompatible type'
        ' "int"; expected "str | bytes"  [arg-type]',
        "Found 1 error in 1 file (checked 1 source file)",
    ]


BACKEND = """
from backends import Backend, Connection

class CountBackend(Backend):
    def message(self, connection: Connection, message: str | bytes) -> None:
        connection.send(len(message))
"""


def test_wheel_has_the_conf_files(names):
    """Each file of conf/ and its folders, in share/socketdock/conf."""
    shipped = {name.partition(".data/")[2] for name in names if ".data/" in name}
    files = [path for path in PROJECT.glob("conf/**/*") if path.is_file()]
    conf = {f"data/share/socketdock/{path.relative_to(PROJECT)}" for path in files}
    assert len(conf) >= 16
    assert shipped == conf


@pytest.mark.once
@pytest.mark.long
def test_source_distribution_has_what_a_clone_has(tmp_path):
    """Also docs, tests and CHANGELOG; nothing that is generated or installed."""
    listed = subprocess.check_output(["git", "ls-files"], cwd=PROJECT, text=True)
    clone = set(listed.splitlines()) - {".gitignore"}
    built = source_distribution(tmp_path)
    with tarfile.open(built) as archive:
        names = {file.name for file in archive.getmembers() if file.isfile()}
    shipped = {name.partition("/")[2] for name in names}
    assert clone <= shipped
    generated = {"PKG-INFO", "setup.cfg"}
    assert not {
        name
        for name in shipped - clone - generated
        if "egg-info/" not in name and not (PROJECT / name).is_file()
    }
    assert not [name for name in shipped if "node_modules/" in name]
    twine = [sys.executable, "-m", "twine", "check", "--strict", str(built)]
    subprocess.run(twine, check=True, stdout=subprocess.DEVNULL, timeout=60)


@pytest.mark.once
def test_readme_is_short_and_works_on_the_package_index(tmp_path_factory):
    """At most 120 lines. Its links and images are absolute in the metadata."""
    lines = (PROJECT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 120
    built = wheel(tmp_path_factory.getbasetemp())
    with zipfile.ZipFile(built) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        description = archive.read(name).decode()
    links = re.findall(r"\]\(([^)]+)\)", description)
    assert len(links) > 20
    assert all(link.startswith("https://") for link in links)
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", description)
    assert images and all("/raw/" in image for image in images)
    assert "\nProject-URL: Changelog, https://" in description


def test_wheel_has_its_license(names):
    """Apache-2.0 requires it."""
    assert any(".dist-info/" in name and name.endswith("/LICENSE") for name in names)


def test_wheel_and_installed_service_have_the_same_version(tmp_path_factory):
    """setup.py reads it from socketdock.py, without importing it."""
    prefix = installation(tmp_path_factory.getbasetemp())
    version = subprocess.check_output(
        [prefix / "bin" / "socketdock", "--version"],
        env={"PYTHONPATH": library(prefix)},
        text=True,
        timeout=30,
    )
    name = wheel(tmp_path_factory.getbasetemp()).name
    assert version == f"SocketDock {name.split('-')[1]} (pure)\n"


def test_setup_needs_nothing_but_setuptools():
    """It prints the version where tornado is not installed."""
    version = subprocess.check_output(
        [sys.executable, "-c", SETUP_WITHOUT_SITE_PACKAGES],
        cwd=PROJECT,
        text=True,
        timeout=30,
    )
    assert version.strip().replace(".", "").isdigit()


SETUP_WITHOUT_SITE_PACKAGES = """
import sys
sys.modules["tornado"] = None  # any import of it fails
sys.argv = ["setup.py", "--version"]
exec(compile(open("setup.py").read(), "setup.py", "exec"), {
    "__name__": "__main__", "__file__": "setup.py"
})
"""
