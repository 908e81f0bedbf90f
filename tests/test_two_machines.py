"""One training on two machines: equal to one machine's, what the cable carries, a machine that
vanishes; and what is written for machines that are not here: SLURM, Kubernetes, the arithmetic.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ENVIRONMENT, ROOT, python, refused, run

from lab import cable, jobs

MODULE = ROOT / "modules/05_DeepSpeed"
SCRIPT = MODULE / "09_two_machines.py"


def trained(tiny_model, *flags) -> dict:
    done = python(SCRIPT, "--model", tiny_model, *flags, check=0, PROFILE="cpu")
    return json.loads(done.stdout.splitlines()[-1])


def test_refusals(tmp_path):
    def sentence(*flags, **variables) -> str:
        return refused(sys.executable, SCRIPT, *flags, **({"PROFILE": "cpu"} | variables))

    assert "--steps must be at least 2" in sentence("--steps", "1")
    assert "--accumulate 1" in sentence("--accumulate", "2")
    assert "not both" in sentence("--cut", "1", "--kill", "1")
    assert "a step from 1 to the last but one" in sentence("--cut", "0")
    assert "a step from 1 to the last but one" in sentence("--kill", "4", "--steps", "4")
    assert "--timeout must be" in sentence("--timeout", "0")
    assert "the program ip is not installed" in sentence(PATH=str(tmp_path))


@pytest.mark.needs("ip")
def test_torchrun_on_two_machines(two_machines, tiny_model):
    """Every loss to its last digit; the bytes of one all-reduce of the gradients; nobody stays."""
    result = trained(tiny_model, "--launchers", "torchrun", "--steps", "3")
    assert result["torchrun_ddp_difference_ratio"] == 0
    assert result["torchrun_ddp_left_count"] == 0
    parameters = result["torchrun_ddp_gloo_bytes"] / 4
    assert parameters == result["torchrun_ddp_nccl_bytes"] / 4 == weights(tiny_model)
    for way in ("sent", "returned"):
        assert 1 < result[f"torchrun_ddp_{way}_bytes"] / (4 * parameters) < 1.02


def weights(folder) -> int:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.long
@pytest.mark.needs("ip")
def test_every_launcher_on_two_machines(two_machines, tiny_model):
    """The losses of one machine; bytes within a few percent of what gloo's collectives send."""
    result = trained(
        tiny_model, "--launchers", "accelerate", "deepspeed", "llamafactory", "--steps", "3"
    )
    kinds = [key.removesuffix("_left_count") for key in result if key.endswith("_left_count")]
    assert len(kinds) == 5
    for kind in kinds:
        assert result[f"{kind}_difference_ratio"] == 0, kind
        assert result[f"{kind}_left_count"] == 0, kind
        # An adapter's gradients are small: the loss, and what else is said, shows beside them.
        most = 1.5 if kind == "llamafactory_lora" else 1.05
        assert 0.97 < result[f"{kind}_sent_bytes"] / result[f"{kind}_gloo_bytes"] < most, kind
    # The other losses are those of plain data parallelism.
    first = result["accelerate_ddp_losses"]
    for kind in ("accelerate_fsdp", "deepspeed_z2", "deepspeed_z3"):
        assert result[f"{kind}_losses"] == pytest.approx(first, rel=1e-5), kind


@pytest.mark.long
@pytest.mark.needs("ip")
def test_a_machine_that_vanishes(two_machines, tiny_model):
    """Of a cut cable neither machine is told, and both end by the timeout, whoever launched them;
    of killed processes machine 0 hears at once.
    """
    flags = ("--steps", "300", "--timeout", "15")
    launchers = ("--launchers", "accelerate", "deepspeed")
    cut = trained(tiny_model, *launchers, "--cut", "2", *flags)
    kill = trained(tiny_model, "--launchers", "torchrun", "--kill", "2", *flags)
    ends = [cut[key] for key in cut if key.endswith("_end_s")]
    assert len(ends) == 8 and all(15 <= end < 45 for end in ends), ends
    assert kill["torchrun_ddp_node0_end_s"] < 15
    for result in (cut, kill):
        for key, value in result.items():
            assert not (key.endswith("_exit_code") and value == 0), key
            assert not (key.endswith("_left_count") and value), key


@pytest.mark.long
@pytest.mark.needs("ip")
@pytest.mark.parametrize("way", ["Ctrl+C", "make stop"])
def test_ended_in_the_middle(two_machines, tiny_model, way):
    """No process stays, on either machine, and no other training begins."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--model", tiny_model, "--steps", "1000"],
        cwd=ROOT,
        env=ENVIRONMENT | {"PROFILE": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "node0" not in jobs.running():
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    time.sleep(3)
    members = jobs.members(jobs.running()["node0"])
    assert members
    if way == "Ctrl+C":
        process.send_signal(signal.SIGINT)
    else:
        run("make", "stop", check=0)
    out, err = process.communicate(timeout=300)
    assert process.returncode == {"Ctrl+C": 130, "make stop": 143}[way], out + err
    assert "Traceback" not in err and not jobs.running()
    assert not [p for p in members if p.is_running() and p.status() != "zombie"]
    assert len(re.findall("^node0: ", out, re.M)) == 1, out


# -----------------------------------------------------------------------------
# Machines that are not here


def known_flags(script: str, words: list[str]) -> None:
    """The script takes every flag among its words."""
    text = python(script, "--help", check=0).stdout
    flags = [word for word in words if word.startswith("--")]
    assert all(re.search(rf"{flag}\b", text) for flag in flags), (script, flags)


def printing(folder, *programs: str) -> dict[str, str]:
    """Stand-ins that print their words, first on PATH by .venv/bin/activate in `folder`."""
    bin_folder = folder / ".venv/bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "activate").write_text(f"PATH={shlex.quote(str(bin_folder))}:$PATH\n")
    for name in programs:
        (bin_folder / name).write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done\n')
        (bin_folder / name).chmod(0o755)
    return {"PATH": f"{bin_folder}{os.pathsep}{ENVIRONMENT['PATH']}"}


def test_the_slurm_script(tmp_path):
    """What each machine of a job of two starts, under stand-ins of SLURM's programs."""
    from torch.distributed.run import get_args_parser

    batch = MODULE / "configs/two_nodes.slurm"
    run("bash", "-n", batch, check=0)
    variables = printing(tmp_path, "torchrun")
    scontrol = '#!/bin/sh\n[ "$*" = "show hostnames a[1-2]" ] && printf "a1\\na2\\n"\n'
    srun = '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\n'
    srun += 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; echo ==; "$@"; done\n'
    for name, text in {"scontrol": scontrol, "srun": srun}.items():
        (tmp_path / ".venv/bin" / name).write_text(text)
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "a[1-2]", "SLURM_JOB_ID": "1234567", "SLURM_NNODES": "2"}
    out = run(
        *("bash", batch, "--steps", "200"),
        check=0,
        SLURM_SUBMIT_DIR=str(tmp_path),
        **job,
        **variables,
    ).stdout
    nodes = [part.split() for part in out.split("==")[1:]]
    assert len(nodes) == 2
    for rank, words in enumerate(nodes):
        given = get_args_parser().parse_args(words)
        assert (given.nnodes, given.node_rank, given.nproc_per_node) == ("2", rank, "2")
        assert (given.master_addr, given.master_port) == ("a1", 24567)
        assert (ROOT / given.training_script).is_file()
        assert given.training_script_args[-2:] == ["--steps", "200"]
        known_flags(given.training_script, given.training_script_args)
    directives = re.findall(r"^#SBATCH --([\w-]+)=", batch.read_text(), re.M)
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "time"} <= set(directives)


def test_the_kubernetes_job(tmp_path):
    """The names that must agree do, and both pods start the launcher with what it takes."""
    from deepspeed.launcher import runner

    service, job = yaml.safe_load_all((MODULE / "configs/two_nodes_k8s.yaml").read_text())
    name = job["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    (spread,) = pod["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == {"job-name": name}
    (container,) = pod["containers"]
    assert [volume["name"] for volume in pod["volumes"]] == [
        mount["name"] for mount in container["volumeMounts"]
    ]
    variables = printing(tmp_path, "deepspeed")
    *shell, text = container["command"]
    hosts = tmp_path / "hostfile"
    for rank in range(2):
        own = {"JOB_COMPLETION_INDEX": str(rank)} | variables
        words = run(
            *shell, text.replace("/tmp/hostfile", str(hosts)), cwd=tmp_path, check=0, **own
        ).stdout.split()
        given = runner.parse_args(words)
        assert given.no_ssh and given.node_rank == rank
        pods = [f"{name}-{index}.{pod['subdomain']}" for index in (0, 1)]
        slots = runner.fetch_hostfile(given.hostfile)
        assert slots == dict.fromkeys(pods, container["resources"]["limits"]["nvidia.com/gpu"])
        assert given.master_addr == pods[0]
        assert (ROOT / given.user_script).is_file()
        known_flags(given.user_script, given.user_args)
        file = given.user_args[given.user_args.index("--deepspeed") + 1]
        assert (ROOT / file).is_file()


def test_the_table_of_slow_networks():
    """Bytes x 8 over the bits a second, as the page's formula says; the sizes are the models'."""
    text = (MODULE / "two_machines.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| 一步.*\n\|[-:|]+\n((?:\|.*\n)+)", text, re.M)
    layer = 16 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))  # q o, k v, MLP
    expected = [28 * layer * 4, 7_615_616_512 * 2, 1.5 * 7_615_616_512 * 2]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    assert len(rows) == len(expected)
    for (_, size, *seconds), number in zip(rows, expected, strict=True):
        assert float(size.split()[0]) == pytest.approx(number / 1e9, rel=0.02)
        for text, gigabits in zip(seconds, (1, 10, 25, 100), strict=True):
            assert float(text.split()[0]) == pytest.approx(number * 8 / gigabits / 1e9, rel=0.05)


def test_a_cause_is_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(MODULE))
    import machines

    log = tmp_path / "log"
    assert machines.cause(log) == "it wrote nothing"
    log.write_text("step 1\n[rank0]: RuntimeError: [/x/pair.cc:553] Connection closed\nafter\n")
    assert machines.cause(log) == "Connection closed"
    log.write_text("torch.distributed.DistBackendError: gone\nValueError: later\n")
    assert machines.cause(log) == "gone"
    log.write_text("error: lower --steps\n")
    assert machines.cause(log) == "lower --steps"
    log.write_text("nothing telling\n\n")
    assert machines.cause(log) == "nothing telling"


def test_the_median_step_is_counted(monkeypatch):
    """A line that is read late moves bytes from a step to the one before, not from the median."""
    monkeypatch.syspath_prepend(str(MODULE))
    import machines

    training = machines.Training("x")
    counts = ((100, 10), (200, 20), (350, 30), (400, 40))
    training.at_steps = [cable.Traffic(sent, back, sent / 10, 0) for sent, back in counts]
    assert training.per_step() == (100, 10, 10)
