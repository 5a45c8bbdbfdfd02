"""What is installed is what setup.py says, and nothing else."""

import subprocess
import sys
import zipfile

import pytest
from project import installation, library, wheel
from service import PROJECT

MODULES = {"socketdock.py", "socketdock_options.py"}
PACKAGES = ("backends", "handlers")


@pytest.fixture
def names(tmp_path_factory):
    """Names of the files in the wheel."""
    with zipfile.ZipFile(wheel(tmp_path_factory.getbasetemp())) as archive:
        return set(archive.namelist())


def test_wheel_has_two_modules_and_two_packages_with_all_their_modules(names):
    """Bare names in site-packages: these, and no `test`, `examples` or `bench`."""
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
        for file in PROJECT.glob("handlers/console/page/*")
    }
    assert len(page) > 5
    assert shipped == MODULES | modules | page


def test_wheel_has_the_conf_files(names):
    """Each file of conf/, to be found in share/socketdock/conf."""
    shipped = {name.partition(".data/")[2] for name in names if ".data/" in name}
    conf = {f"data/share/socketdock/conf/{f.name}" for f in PROJECT.glob("conf/*")}
    assert len(conf) >= 6
    assert shipped == conf


def test_wheel_has_its_license(names):
    """Apache-2.0 asks for it."""
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
    assert version == f"SocketDock {name.split('-')[1]}\n"


def test_setup_needs_nothing_but_setuptools():
    """Its version can be asked for where tornado is not installed."""
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
