"""The repository's own promises: every script, configuration, make target and readme block is
covered by a test that runs it.
"""

import ast
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, python, run
from readmes import BLOCKS, README_FILES
from test_smoke import PACKAGES

TRACKED = run("git", "ls-files", "-co", "--exclude-standard", check=0).stdout.splitlines()
MODULE_SCRIPTS = [f for f in TRACKED if re.fullmatch(r"modules/[^/]+/\d\d_\w+\.py", f)]
SCRIPTS = MODULE_SCRIPTS + [f for f in TRACKED if re.fullmatch(r"scripts/\w+\.py", f)]
TARGETS = re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)

EDITING = "modules/02_qwen_image_edit"
DEEPSPEED = "modules/05_DeepSpeed"
TUNING = "modules/06_LLaMA-Factory"
# Which test reads a configuration file as its user would. A file that no pattern claims fails
# test_every_configuration_is_read.
CONFIGURATIONS = {
    r"configs/profiles/\w+\.yaml": "test_profile.py::test_every_profile_loads",
    r"configs/cards\.yaml": "test_plan.py::test_cards_are_described_with_their_sources",
    r"configs/claims\.yaml": "test_report.py::test_claims_go_by_records_that_exist_or_will",
    r"configs/models\.yaml": "test_models.py::test_catalogue",
    r"configs/calibration\.yaml": "test_plan.py::test_calibration_lines",
    r"configs/published\.yaml": "test_plan.py::test_speeds_of_4090s_that_others_published",
    rf"{EDITING}/shapes\.json": "test_image_edit.py::test_shapes_json_holds_the_published_shapes",
    r"environment\.yml": "test_layout.py::test_environment_yml",
    r"modules/03_vllm/configs/monitoring/rules(_test)?\.yml": "test_monitoring.py::test_rules",
    r"modules/03_vllm/configs/recipes/[\w.-]+\.yaml": "test_server.py::test_recipes",
    r"modules/03_vllm/configs/monitoring/.*": "test_server.py::test_monitoring",
    r"modules/04_Accelerate/configs/\w+\.yaml": "test_accelerate.py::test_launcher_yaml",
    rf"{DEEPSPEED}/(ds_config|configs/z[\w-]+)\.json": "test_deepspeed.py::test_every_key_is_read",
    rf"{DEEPSPEED}/configs/two_nodes_k8s\.yaml": "test_two_machines.py::test_the_kubernetes_job",
    r"tests/deepspeed_forms\.json": "test_deepspeed.py::test_forms_that_people_use_are_taken",
    rf"{TUNING}/configs/\w+\.yaml": "test_llamafactory.py::test_every_yaml_is_read_by_llamafactory",
    rf"{TUNING}/configs/methods/early_stopping\.yaml": (
        "test_llamafactory.py::test_early_stopping_keeps_the_best_checkpoint"
    ),
    rf"{TUNING}/configs/methods/(?!early_stopping)\w+\.yaml": (
        "test_llamafactory.py::test_every_method_is_read_by_llamafactory"
    ),
    rf"{TUNING}/configs/lm_eval/\w+\.yaml": (
        "test_evaluate.py::test_the_task_of_lm_evaluation_harness_asks_the_same"
    ),
    rf"{TUNING}/configs/zero\d\.json": "test_llamafactory.py::test_zero_json_is_read_by_deepspeed",
    rf"{TUNING}/data/.*\.json": "test_data.py::test_files_are_what_the_script_writes",
    r"results/[^/]+/[^/]+/\w[\w.-]*\.json": "test_results.py::test_records_are_complete",
}
# Make targets that no readme block runs, and the test that does.
TARGETS_TESTED = {
    "help": "test_help_lists_every_target",
    "test": ".ci/run",
    "test-long": ".ci/run",
    "quickstart": ".ci/run",
    "report": "test_report",
    "snapshot": "test_snapshot",
    "lock": "test_lock_is_reproducible",
    "download": "test_download",
    "data": "test_files_are_what_the_script_writes",
    "evidence": "test_make_evidence_dry",
    "clean": "test_clean",
    "lint": "test_lint",
    "tables": "test_tables_do_not_drift",
}


def executed() -> str:
    """The text of all readme blocks that run on some machine, and the recipes of the make targets
    in them.
    """
    text = "\n".join(block.code for block in BLOCKS)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z0-9-]+)", text):
        if recipe := re.search(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.M):
            text += "\n" + recipe[1]
    return text


@pytest.mark.parametrize("script", MODULE_SCRIPTS)
def test_every_module_script_is_run_by_a_readme(script):
    assert script in executed(), f"no readme block runs {script}, directly or through make"


@pytest.mark.parametrize("target", TARGETS)
def test_every_make_target_is_run(target):
    text = "\n".join(block.code for block in BLOCKS)
    if re.search(rf"\bmake {target}\b(?!-)", text):
        return
    assert target in TARGETS_TESTED, f"no readme block and no test runs make {target}"
    where = TARGETS_TESTED[target]
    sources = (
        (ROOT / ".ci/run").read_text()
        if where == ".ci/run"
        else "".join(f.read_text() for f in (ROOT / "tests").glob("test_*.py"))
    )
    assert f"make {target}" in sources if where == ".ci/run" else f"def {where}(" in sources


def test_documents_name_only_targets_that_exist():
    for file in [*README_FILES, *ROOT.glob("modules/*/PLAN.md"), ROOT / ".CLAUDE.md"]:
        for target in re.findall(r"`(?:[A-Z]+=\S+ )?make ([a-z][a-z0-9-]*)", file.read_text()):
            assert target in TARGETS, f"{file} names make {target}"


@pytest.mark.parametrize("file", [f for f in TRACKED if re.search(r"\.(ya?ml|json)$", f)])
def test_every_configuration_is_read(file):
    content = (ROOT / file).read_text()
    if file.endswith("json"):
        json.loads(content)
    else:
        list(yaml.safe_load_all(content))
    claimed = [where for pattern, where in CONFIGURATIONS.items() if re.fullmatch(pattern, file)]
    assert claimed, (
        f"no test reads {file} as its user would: add one, and name it in CONFIGURATIONS"
    )
    path, _, name = claimed[0].partition("::")
    assert not name or f"def {name}(" in (ROOT / "tests" / path).read_text(), (
        f"{claimed[0]} does not exist"
    )


def test_locks_hold_every_package_of_the_design():
    for lock in ("cpu", "gpu", "quantise"):
        text = (ROOT / "locks" / f"{lock}.txt").read_text()
        names = {
            name: version for name, version in re.findall(r"^([a-z0-9-]+)==(\S+) \\$", text, re.M)
        }
        for package in () if lock == "quantise" else PACKAGES:
            assert package in names or (lock == "cpu" and f"{package}-cpu" in names), (
                f"{package} is not in locks/{lock}.txt"
            )
        for entry in re.split(r"\n(?=[a-z0-9])", text.strip()):
            assert "--hash=sha256:" in entry, f"not hashed: {entry.splitlines()[0]}"
    assert not re.search(r"https?://|file:|--find-links|--index", text), "a lock names a registry"


def test_environment_yml():
    content = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert content["name"] == "videofen"
    names = {d.split("=")[0] for d in content["dependencies"]}
    assert {"python", "cxx-compiler", "uv", "cuda-nvcc"} <= names
    assert all(p in (ROOT / "environment.yml").read_text() for p in PACKAGES)


def test_lock_is_reproducible(tmp_path):
    """`make lock` on unchanged inputs changes nothing."""
    locks = ("cpu", "gpu", "quantise")
    before = {lock: (ROOT / "locks" / f"{lock}.txt").read_bytes() for lock in locks}
    try:
        run("make", "lock", check=0)
        assert {lock: (ROOT / "locks" / f"{lock}.txt").read_bytes() for lock in before} == before
    finally:
        for lock, content in before.items():
            (ROOT / "locks" / f"{lock}.txt").write_bytes(content)


HEAVY = {"torch", "vllm", "transformers", "deepspeed", "accelerate", "matplotlib"}


@pytest.mark.parametrize("script", [s for s in SCRIPTS if "argparse" in (ROOT / s).read_text()])
def test_help_is_quick_and_says_how_to_run(script):
    """No heavy package is imported for --help, on any profile, and the text is the script's
    docstring.
    """
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"  # as Python does for a script
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        f"heavy = {HEAVY} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for profile in ("cpu", "4090x2"):
        out = python("-c", code, script, check=0, PROFILE=profile).stdout
    first = ast.get_docstring(ast.parse((ROOT / script).read_text())).splitlines()[0]
    assert first in out


def awks() -> list[str]:
    return [awk for awk in ("mawk", "gawk", "original-awk", "busybox") if shutil.which(awk)]


@pytest.mark.parametrize("awk", awks())
def test_help_lists_every_target(awk, tmp_path):
    """Every target once, in short lines, in groups, whatever awk this system has."""
    (tmp_path / "awk").symlink_to(shutil.which(awk))
    out = run("make", check=0, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}").stdout
    assert all(len(re.findall(rf"(?m)^  make {t} +\S", out)) == 1 for t in TARGETS)
    assert max(map(len, out.splitlines())) <= 100
    groups = re.findall(r"(?m)^(\w.*)\n  make ", out)[
        1:
    ]  # the line before `make help` is no heading
    assert [group[:2] for group in groups] == ["Fi", "01", "02", "03", "04", "05", "06", "Up"], (
        groups
    )
    phony = " ".join(re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)).split()
    assert sorted(phony) == sorted([*TARGETS, "env"])


def test_help_begins_with_the_first_steps():
    assert awks(), "no awk of a known name"
    assert TARGETS[:6] == ["help", "setup", "quickstart", "progress", "doctor", "smoke"]


def test_targets_of_module_03_stand_in_the_order_of_the_road():
    recipes = re.findall(r"modules/03_vllm/(\d\d)_\w+\.py", (ROOT / "Makefile").read_text())
    assert recipes == sorted(recipes) and len(recipes) == 18


def test_programs_of_the_environment_are_on_the_path_of_every_target_but_setup(tree):
    """In an ordinary shell, in a folder with a blank; set-up must not take its Python from what it
    is about to replace.
    """
    (tree / ".venv").symlink_to(ROOT / ".venv")
    (tree / "scripts/setup.sh").write_text("#!/bin/sh\necho set-up sees $PATH\n")
    shell = f"{tree}/.venv/bin:/usr/bin:/bin"  # as make finds it, when a make has called it
    for path in ("/usr/bin:/bin", shell):
        found = run(
            "make", "--eval", "where: ; @command -v ninja", "where", cwd=tree, check=0, PATH=path
        ).stdout.strip()
        assert found == str(tree / ".venv/bin/ninja")
        assert (
            run("make", "setup", cwd=tree, check=0, PATH=path).stdout
            == "set-up sees /usr/bin:/bin\n"
        )


def test_every_make_recipe_parses():
    for target in TARGETS:
        run("make", "-n", target, check=0)


def test_make_evidence_dry():
    """Every target of `make evidence` exists, and every module script that stores a record is run
    by one of them.
    """
    targets = runpy.run_path(str(ROOT / "scripts/evidence.py"), run_name="imported")["TARGETS"]
    recipes = "".join(run("make", "-n", *shlex.split(target), check=0).stdout for target in targets)
    storing = {s for s in MODULE_SCRIPTS if "results.finish" in (ROOT / s).read_text()}
    assert len(storing) >= 8 and not {s for s in storing if s not in recipes}


def test_clean(tree):
    (tree / "runs" / "x").mkdir(parents=True)
    (tree / "lab" / "__pycache__").mkdir(exist_ok=True)
    run("make", "clean", cwd=tree, check=0)
    assert (
        not (tree / "runs").exists()
        and not (tree / "lab" / "__pycache__").exists()
        and (tree / "lab" / "models.py").exists()
    )


def test_lint():
    done = run("make", "lint")
    assert done.returncode == 0, done.stdout


def test_every_measure_of_lint_fails_where_it_is_broken(tmp_path):
    dense = "\n".join(f"a{n}, b{n} = f(1, 2, 3, 4), g[5:6:7]" for n in range(30))
    files = {
        "modules/03_vllm/01_serve.py": '"""vllm.entrypoints.openai.api_server"""\n'
        + "x = 1  # vllm.entrypoints.openai.api_server\n" * 301,
        "modules/03_vllm/02_chat.py": "\n" * 110 + "client.chat.completions.create()\n",
        "modules/03_vllm/99_new.py": dense,
        "modules/03_vllm/mini_vllm/a.py": "y = 1\n" * 161,
        "modules/03_vllm/mini_vllm/b.py": "y = 1\n" * 690,
        "lab/x.py": "f(found := 1)\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    problems = python("scripts/lint.py", tmp_path, check=1).stderr
    for problem in (
        "01_serve.py: 302 lines, at most 300",
        "01_serve.py: no code has vllm",
        "02_chat.py:111: the lesson, due before line 110",
        "99_new.py: say in LESSON of scripts/lint.py",
        "modules/01_single_gpu_smoke/01_smoke.py: in LESSON, but not here",
        "mini_vllm/a.py: 161 lines, at most 160",
        "mini_vllm: 851 lines in all, at most 850",
        "modules: a median file of 161 lines, at most 160",
        "lab/x.py:1: a walrus in arguments",
        "lab/x.py:1: found says nothing",
        "99_new.py has 30",
    ):
        assert problem in problems, problem


def test_tracked_tree_is_small():
    sizes = {f: (ROOT / f).stat().st_size for f in TRACKED}
    assert sum(sizes.values()) < 8e6
    assert all(size < 150_000 for f, size in sizes.items() if f.endswith((".png", ".svg")))


def test_no_machine_paths():
    for file in TRACKED:
        if file.startswith("results/") or not Path(ROOT / file).suffix:
            continue
        found = re.search(
            r"(?<![\w.])/(?:work|root|opt|home)/\w+", (ROOT / file).read_text(errors="ignore")
        )
        assert not found or file.startswith("tests/"), f"{file} holds the path {found[0]}"


def test_interpreter_is_the_environment():
    assert (
        subprocess.run([ROOT / ".venv/bin/python", "-c", "import lab"], check=False).returncode == 0
    )
    assert Path(sys.prefix).resolve() == (ROOT / ".venv").resolve(), (
        "run the tests with make test, in the environment of the repository"
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_ends_a_script_quietly(unbuffered):
    """`| head -1`: by SIGPIPE, as other programs end, also where the rest is printed at the end."""
    script = f"import lab\nfor line in range({20_000 if unbuffered else 1}): print(line)"
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-c", script]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


def test_a_broken_socket_is_still_an_error():
    script = "import lab, os\nr, w = os.pipe(); os.close(r); os.write(w, b'x')"
    done = run(sys.executable, "-c", script, check=1)
    assert "BrokenPipeError" in done.stderr
