"""A test whose Debian package is missing: skipped, counted and told how to mend; under CI=true it
fails.
"""

import re

import pytest
from conftest import PACKAGES, ROOT, run

TESTS = ["tests/test_monitoring.py::test_rules", "tests/test_long.py::test_second_run_offline"]


@pytest.fixture
def without(tmp_path):
    """A PATH on which neither promtool nor ip is, and all that these two tests need besides."""
    (tmp_path / "python").symlink_to(ROOT / ".venv/bin/python")
    for tool in ("git", "make", "unshare"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    return {"PATH": str(tmp_path), "HOME": str(tmp_path)}


def pytest_run(**environment) -> list[str]:
    """The last lines of pytest over TESTS, and its exit code at the end."""
    command = [ROOT / ".venv/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    done = run(
        *command, TESTS_END_AT="inf", **environment
    )  # late in .ci/run a slow test is skipped for another reason
    return [*done.stdout.splitlines(), str(done.returncode)]


def test_skipped_and_counted(without):
    *lines, code = pytest_run(CI="", **without)
    assert code == "0" and any(line.startswith("2 skipped") for line in lines)
    for words in (
        "promtool not installed: sudo apt install prometheus",
        "ip not installed: sudo apt install iproute2",
    ):
        assert any(line.startswith("SKIPPED") and line.endswith(words) for line in lines), lines
    assert (
        "2 tests skipped for missing Debian packages: sudo apt install iproute2 prometheus" in lines
    )


def test_under_ci_it_fails(without):
    *lines, code = pytest_run(CI="true", **without)
    assert code == "1" and "promtool not installed: sudo apt install prometheus" in lines
    assert any(line.startswith("2 errors") for line in lines) and not any(
        "tests skipped for" in line for line in lines
    )


def test_ci_installs_them():
    installed = re.findall(r"packages\+=\((\S+)\)", (ROOT / ".ci/run").read_text())
    assert set(PACKAGES.values()) <= set(installed)


def test_every_such_program_is_declared():
    """A test file that starts one of these programs names it in a mark."""
    for file in (ROOT / "tests").glob("test_*.py"):
        text = file.read_text()
        started = {
            name
            for name in PACKAGES
            if re.search(
                rf'(?:run|Popen)\(\[?"{name}"|command = \["{name}"|"--net", "{name}"', text
            )
        }
        declared = {
            name
            for mark in re.findall(r"mark\.needs\((.*?)\)", text)
            for name in re.findall(r'"(\w+)"', mark)
        }
        assert started <= declared, f"{file.name} starts {started - declared}"
