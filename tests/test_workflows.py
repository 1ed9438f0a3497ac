"""The workflows of .github: what they call is in the repository, and what may publish is one job, from a tag alone."""

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in sorted(ROOT.glob(".github/workflows/*.yml"))}
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
JOBS = [(name, job) for name, workflow in WORKFLOWS.items() for job in workflow["jobs"]]


def steps(name: str, job: str) -> list[dict]:
    return WORKFLOWS[name]["jobs"][job]["steps"]


def test_they_are_there():
    assert WORKFLOWS.keys() == {"ci.yml", "site.yml", "wheels.yml"}


@pytest.mark.parametrize(("name", "job"), JOBS)
def test_what_they_call_is_there(name, job):
    for step in steps(name, job):
        assert ("run" in step) != ("uses" in step)
        for target in re.findall(r"\bmake ([\w-]+)", step.get("run", "")):
            assert target in TARGETS
        for path in re.findall(r"\b(?:bash|python) ([\w.]\S+)|(mambaout_kernels/\S+)", step.get("run", "")):
            assert (ROOT / "".join(path)).is_file(), path
        if "uses" in step:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@(?:release/)?v\d+", step["uses"]), "pinned by major version"


@pytest.mark.parametrize(("name", "job"), JOBS)
def test_jobs_end_and_follow_each_other(name, job):
    settings = WORKFLOWS[name]["jobs"][job]
    assert settings["timeout-minutes"] <= 180
    needs = settings.get("needs", [])
    for other in [needs] if isinstance(needs, str) else needs:
        assert other in WORKFLOWS[name]["jobs"]


def test_permissions():
    """Each workflow may read; beyond that the one job that publishes the site, and the one that publishes wheels."""
    assert all(workflow["permissions"] == {"contents": "read"} for workflow in WORKFLOWS.values())
    beyond = {job: WORKFLOWS[name]["jobs"][job] for name, job in JOBS if "permissions" in WORKFLOWS[name]["jobs"][job]}
    assert beyond.keys() == {"deploy", "publish"}
    assert beyond["publish"]["permissions"] == {"id-token": "write"}
    assert beyond["publish"]["if"] == "github.event_name == 'push' && github.ref_type == 'tag'"
    assert not any("run" in step for job in beyond.values() for step in job["steps"])
    assert not any("secrets." in str(workflow) for workflow in WORKFLOWS.values())


def test_the_version_that_a_tag_has_to_be():
    [check] = [step for step in steps("wheels.yml", "sources") if step.get("if") == "github.ref_type == 'tag'"]
    pattern = re.search(r'grep -qx "(.*)" mambaout_kernels/version\.py', check["run"])[1].replace('\\"', '"')
    found = (ROOT / "mambaout_kernels" / "version.py").read_text()
    version = re.search(r'"(.*)"', found.splitlines()[-1])[1]
    assert pattern.replace("${GITHUB_REF_NAME#v}", version) in found.splitlines()
