"""Profiles and models: detection, overriding, and one clear sentence for everything a user may get wrong."""

import os
import re

import pytest
from conftest import ROOT, python, refused, run

from lab import machine, profile

SMOKE = "modules/01_single_gpu_smoke/01_smoke.py"


def test_every_profile_loads():
    """Both profiles hold the same settings, every one of which some script reads; env applies to every launcher."""
    cpu, gpus = (profile.read_yaml(ROOT / "configs/profiles" / f"{n}.yaml") for n in ("cpu", "4090x2"))
    assert cpu.keys() == gpus.keys()
    source = "".join(f.read_text() for folder in ("modules", "scripts", "lab") for f in (ROOT / folder).rglob("*.py"))
    for section, values in cpu.items():
        assert section == "requires" or f"profile.{section}" in source or f'"{section}"' in source, f"no script reads {section}"
        if isinstance(values, dict) and section not in ("env", "requires"):
            assert values.keys() == gpus[section].keys(), section
            for key in values:
                assert re.search(rf"\.{key}\b", source), f"no script reads {section}.{key}"


def test_4090x2_is_what_the_design_asks_for():
    p = profile.read_yaml(ROOT / "configs/profiles/4090x2.yaml")
    assert (p["serve"]["model"], p["serve"]["args"]["tensor-parallel-size"]) == ("qwen2.5-14b-instruct", 2)
    assert p["env"]["NCCL_P2P_DISABLE"] == 1


def test_detection(monkeypatch):
    card = {"name": "NVIDIA GeForce RTX 4090", "memory_gib": 24.0, "driver": "580.1"}
    for cards, expected, name in ([], "cpu", f"cpu-{machine.cores()}c"), ([card], "cpu", "4090"), ([card, card], "4090x2", "4090x2"):
        monkeypatch.setattr(machine, "gpus", lambda cards=cards: cards)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert profile.detect() == expected
        assert machine.name() == name


def test_memory_cap(monkeypatch):
    """A larger card that stands in for a 24 GB one: the allocator's ceiling, beside the profile's own settings; else nothing changes."""
    monkeypatch.setattr(machine, "gpus", lambda: [{"name": "NVIDIA H100 80GB HBM3", "memory_gib": 80.0, "driver": "580.1"}] * 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    ours = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "NCCL_P2P_DISABLE": 1}
    monkeypatch.delenv("MEMORY_CAP_GIB", raising=False)
    assert profile.capped(ours) == ours
    monkeypatch.setenv("MEMORY_CAP_GIB", "24")
    assert profile.capped(ours) == ours | {"PYTORCH_ALLOC_CONF": "expandable_segments:True,per_process_memory_fraction:0.3000"}
    assert profile.capped({}) == {"PYTORCH_ALLOC_CONF": "per_process_memory_fraction:0.3000"} and machine.name() == "h100x2-cap24"


def test_environment_reaches_launchers_and_the_user_wins():
    out = run("bash", "-c", 'eval "$(python -m lab.profile)"; python -m lab.profile env', check=0, VLLM_CPU_KVCACHE_SPACE="3").stdout
    assert "VLLM_NO_USAGE_STATS=1" in out and "VLLM_CPU_KVCACHE_SPACE=3" in out


def test_unknown_profile():
    assert "PROFILE=laptop" in (said := refused("python", SMOKE, PROFILE="laptop")) and "cpu" in said


@pytest.mark.skipif(bool(machine.gpus()), reason="has GPUs")
def test_no_gpu_under_4090x2():
    assert "needs 2 NVIDIA GPUs" in refused("make", "vllm-serve", "PROFILE=4090x2")
    assert "--tensor-parallel-size 2" in run("python", "modules/03_vllm/01_serve.py", "--dry-run", PROFILE="4090x2", check=0).stdout


@pytest.mark.parametrize("content", ["serve: {model: [", "- a list", ""])
def test_broken_yaml(tree, content):
    (tree / "configs/profiles/cpu.yaml").write_text(content)
    assert "cpu.yaml" in refused("python", SMOKE, cwd=tree, PYTHONPATH=str(tree), PROFILE="cpu")


def test_unknown_model_and_missing_folder(tmp_path):
    assert "smollm2-135m" in refused("python", SMOKE, "--model", "gpt-5")
    assert "no model folder ./nowhere" in refused("python", SMOKE, "--model", "./nowhere")
    assert "no config.json" in refused("python", SMOKE, "--model", str(tmp_path))
    assert "unknown model" in refused("make", "vllm-serve", "MODEL=gpt-5")


def test_hub_out_of_reach():
    """A hub id that cannot be had: one sentence that names the mirror variables (a port where nobody listens stands for the hub)."""
    for variable in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"USE_MODELSCOPE_HUB": "1", "MODELSCOPE_DOMAIN": "127.0.0.1:9"}):
        said = refused("python", SMOKE, "--model", "Qwen/Qwen2.5-0.5B-Instruct", timeout=400, **variable)
        assert "HF_ENDPOINT" in said


def test_hub_variables_reach_the_hub(monkeypatch, tmp_path):
    """HF_ENDPOINT and USE_MODELSCOPE_HUB decide where a model comes from: a server here sees the requests."""
    import http.server
    import threading

    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        said = refused("python", "-m", "lab.models", "qwen2.5-0.5b-instruct", HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HOME=str(tmp_path))
        hub.shutdown()
    assert any("Qwen/Qwen2.5-0.5B-Instruct" in path for path in asked), (said, asked)


def test_path_with_space_and_chinese_characters(tree, small_model):
    out = python(SMOKE, "--matmul-size", "128", "--copy-mib", "1", "--model", small_model, cwd=tree, PYTHONPATH=str(tree), RECORDS="", check=0).stdout
    assert "Paris" in out and (tree / "runs/records/01_single_gpu_smoke/01_smoke.json").exists()


def test_read_only_home(small_model):
    done = python(SMOKE, "--matmul-size", "128", "--copy-mib", "1", check=0, HOME="/proc")
    assert "Paris" in done.stdout
    exported = python("-m", "lab.profile", check=0, HOME="/proc").stdout
    assert f"HF_HOME={ROOT}" in exported.replace("'", "") and os.environ.get("HOME") != "/proc"
