"""Module 02: the real QwenImageEditPipeline on this machine, the recipes' arithmetic, bad input."""

import contextlib
import functools
import importlib
import itertools
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT, python, refused
from PIL import Image, ImageChops

from lab.planner import images

MODULE = ROOT / "modules" / "02_qwen_image_edit"
SCRIPT = MODULE / "01_edit.py"
README = (MODULE / "readme.md").read_text(encoding="utf-8")
CARD = 23.5  # GiB that a 24 GB card has to give


@pytest.fixture(scope="module")
def scripts():
    """The module's scripts, imported as they import each other: {name: module}."""
    environment = dict(os.environ)
    os.environ["PROFILE"] = "cpu"
    sys.path.insert(0, str(MODULE))
    yield {name: importlib.import_module(name) for name in ("01_edit", "recipes", "random_model")}
    sys.path.remove(str(MODULE))
    os.environ.clear()
    os.environ.update(environment)  # without what the cpu profile set for its libraries


@pytest.fixture
def small_condition(monkeypatch):
    """The pipeline sees its input as 128 x 128 pixels instead of the 1024 x 1024 that it asks for:
    what it computes of them is the same, in a fraction of the time.
    """
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as pipeline

    dimensions = pipeline.calculate_dimensions
    small = functools.partial(dimensions, 128 * 128)
    monkeypatch.setattr(pipeline, "calculate_dimensions", lambda _, ratio: small(ratio))


@pytest.fixture(scope="module")
def tiny(scripts, small_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    scripts["random_model"].build("tiny", folder)
    return folder


def run_main(scripts, *arguments) -> None:
    """Run 01_edit.py's main in this process."""
    argv = sys.argv
    handler = signal.getsignal(signal.SIGTERM)
    sys.argv = [str(SCRIPT), *map(str, arguments)]
    try:
        scripts["01_edit"].main()
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)


def edit(scripts, tiny, output, *arguments) -> Image.Image:
    """The picture that 01_edit.py makes, a small one in two steps."""
    small = ("--model", tiny, "--output", output, "--size", "64", "--steps", "2")
    run_main(scripts, *small, *arguments)
    return Image.open(output / "output.png").convert("RGB").copy()


def refusal(scripts, capsys, *arguments) -> str:
    """The one sentence with which 01_edit.py refuses the arguments, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_main(scripts, *arguments)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(errors) == 1, errors
    return errors[0]


def difference(a, b) -> float:
    """Mean absolute difference of two pictures, 0 to 255."""
    pixels = ImageChops.difference(a, b).tobytes()
    return sum(pixels) / len(pixels)


def test_edits_end_to_end(small_model, tmp_path):
    """No arguments but a folder: the profile's recipe, the drawn picture, a record; and torchvision
    is not needed for it.
    """
    done = python(SCRIPT, "--output", tmp_path, check=0, PROFILE="cpu")
    assert (
        "QwenImageEditPipeline of diffusers loaded" in done.stdout
        and "the weights are random" in done.stdout
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["script"] == "02_qwen_image_edit/01_edit"
    assert (result["width_px"], result["height_px"], result["step_count"]) == (256, 256, 4)
    assert (
        0 < result["step_s"] < result["total_s"]
        and result["load_s"] > 0
        and result["host_peak_gib"] > 0
    )
    assert sorted(f.name for f in tmp_path.iterdir()) == ["output.png", "plain_side_by_side.png"]
    assert Image.open(tmp_path / "output.png").size == (256, 256)
    assert Image.open(tmp_path / "plain_side_by_side.png").size == (384 * 2 + 8, 384)
    assert "100%" in done.stderr, "no progress was shown"


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed here")
def test_torchvision_is_not_imported(scripts, tiny, tmp_path, small_condition):
    edit(scripts, tiny, tmp_path)
    assert "torchvision" not in sys.modules


def test_seed_words_and_picture_decide(scripts, tiny, tmp_path, small_condition):
    """The same arguments give the same picture; another seed, prompt or input another one: all
    three reach the transformer.
    """
    make = functools.partial(edit, scripts, tiny, tmp_path)
    first = make()
    assert difference(first, make()) == 0
    assert difference(first, make("--seed", 1)) > 1
    assert difference(first, make("--prompt", "a very different wish about the square")) > 0
    assert difference(first, make("--true-cfg-scale", 1)) > 0
    Image.new("RGBA", (300, 100), (10, 200, 30, 128)).save(tmp_path / "green.webp")
    wide = make("--image", tmp_path / "green.webp")
    assert wide.size == (112, 64)  # the input's shape, each side a multiple of 16 and at least 64
    Image.new("RGB", (64, 64), "green").save(tmp_path / "square.png")
    assert difference(first, make("--image", tmp_path / "square.png")) > 0


def test_random_model_is_loaded_whole_and_always_the_same(scripts, tiny, tmp_path, monkeypatch):
    """Two builds agree bit by bit, one of them in shards as `full` has them, and from_pretrained
    takes every tensor from the files.
    """
    import torch
    from safetensors.torch import load_file

    monkeypatch.setattr(scripts["random_model"], "SHARD", 100_000)
    sharded = tmp_path / "sharded"
    scripts["random_model"].build("tiny", sharded)
    assert len(list(sharded.glob("text_encoder/model-*-of-*.safetensors"))) > 1
    pipes = [
        scripts["01_edit"].load("plain", folder, "cpu", torch.bfloat16)
        for folder in (tiny, sharded)
    ]
    assert type(pipes[0]) is importlib.import_module("diffusers").QwenImageEditPipeline
    for component in ("transformer", "text_encoder", "vae"):
        written = {
            name: tensor
            for file in (tiny / component).glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for pipe in pipes:
            loaded = getattr(pipe, component).state_dict()
            assert loaded.keys() == written.keys()
            assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items()), (
                component
            )


def test_fp8_recipe(scripts, tiny, small_condition):
    """The code of recipe fp8, both of its cards being the CPU: linear layers in float8, norms not,
    nearly the same picture.
    """
    import torch

    asked = {"prompt": "x", "negative_prompt": " ", "height": 64, "width": 64}
    asked |= {"image": Image.new("RGB", (64, 64), "red"), "num_inference_steps": 2}
    pictures = {}
    for recipe in ("plain", "fp8"):
        pipe = scripts["01_edit"].load(recipe, tiny, "cpu", torch.float32, cards=("cpu", "cpu"))
        for seed in (0, 1):
            generator = torch.Generator().manual_seed(seed)
            pictures[recipe, seed] = pipe(**asked, generator=generator).images[0]
    kinds = {name: tensor.dtype for name, tensor in pipe.transformer.state_dict().items()}
    counted = images.stored_bytes
    for name, dtype in kinds.items():
        is_counted_as_fp8 = counted(name, (4, 4), "fp8") == 16
        assert (dtype == torch.float8_e4m3fn) == is_counted_as_fp8, f"{name} is {dtype}"
    by_fp8 = difference(pictures["plain", 0], pictures["fp8", 0])
    by_the_seed = difference(pictures["plain", 0], pictures["plain", 1])
    assert 0 < by_fp8 < by_the_seed


@pytest.fixture(scope="module")
def full(scripts) -> dict:
    random_model = scripts["random_model"]
    return {
        name: random_model.shapes(model) for name, model in random_model.components("full").items()
    }


def test_real_shapes_are_the_readmes(full):
    counts = {
        name: sum(math.prod(shape) for shape in shapes.values()) for name, shapes in full.items()
    }
    assert (
        f"{counts['transformer'] / 1e9:.2f}B" == "20.43B"
        and f"{counts['text_encoder'] / 1e9:.2f}B" == "8.29B"
    )
    assert (
        f"{counts['vae'] / 1e9:.3f}B" == "0.127B"
        and f"{2 * sum(counts.values()) / 1e9:.1f} GB" == "57.7 GB"
    )
    for figure in ("20.43B", "8.29B", "0.127B", "57.7 GB"):
        assert figure in README


def test_shapes_json_holds_the_published_shapes(scripts, full):
    """The same shapes as diffusers' and transformers' own classes, as often, and the same bytes
    under every way of storing.
    """
    from collections import Counter

    file = scripts["recipes"].published()
    for component, tensors in full.items():
        assert Counter(file[component].values()) == Counter(tensors.values())
        for how in ("bf16", "fp8", "nf4", "pinned", "gguf"):
            count = [
                sum(images.stored_bytes(*item, how) for item in t.items())
                for t in (file[component], tensors)
            ]
            assert count[0] == pytest.approx(count[1], rel=1e-9), (component, how)


def test_recipes_fit_what_they_should(scripts, full):
    lacking = scripts["recipes"].lacking
    one, two = {"cuda:0": CARD}, {"cuda:0": CARD, "cuda:1": CARD}

    def fitting(cards: dict, host: int) -> list[str]:
        room = cards | {"host": host}
        return [r for r in scripts["recipes"].RECIPES if not lacking(r, full, 1024, room)]

    assert fitting(one, host=128) == ["nf4", "group-offload"]
    assert fitting(two, host=64) == ["fp8", "nf4"]
    assert fitting({"cuda:0": 139}, host=128) == ["plain", "nf4", "group-offload"]
    assert fitting(two, host=32) == ["nf4"]
    assert fitting({"cuda:0": 11.5}, host=128) == ["group-offload"]
    assert "cuda:1 (no such card)" in lacking("fp8", full, 1024, one | {"host": 64})
    assert "cuda:0" in lacking("fp8", full, 2048, two | {"host": 64}), "a larger picture needs more"


def test_readme_table_is_the_arithmetic(scripts, full):
    """The readme's predictions, row by row."""
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (.*) \|$", README, re.M))
    for recipe in scripts["recipes"].RECIPES:
        gib = scripts["recipes"].needs(recipe, full, 1024)
        expected = [
            f"{gib[place]:.1f}" if place in gib else "–" for place in ("cuda:0", "cuda:1", "host")
        ]
        assert rows[recipe].split(" | ")[-3:] == expected, recipe


def test_what_fits_prints_the_table():
    done = python(MODULE / "02_what_fits.py", check=0, PROFILE="cpu")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["weights_gb"] == 57.7 and result["transformer_parameters_count"] == 20430401088
    assert "does not fit here" in done.stdout and "cannot" not in done.stderr
    assert "at least 64" in refused(
        "python", MODULE / "02_what_fits.py", "--size", "1", PROFILE="cpu"
    )


BAD = {
    "no such picture": (["--image", "nowhere.png"], "no picture nowhere.png"),
    "not a picture": (["--image", "README.md"], "README.md is not a picture"),
    "empty prompt": (["--prompt", "  "], "prompt is empty"),
    "unknown recipe": (["--recipe", "fp4"], "choose one of plain, fp8, nf4, group-offload"),
    "recipe of a GPU": (["--recipe", "fp8"], "use --recipe plain"),
    "one step": (["--steps", "1"], "at least 2"),
    "huge": (["--size", "9000"], "64 to 2048"),
    "no model": (["--model", "gpt-5"], "unknown model gpt-5"),
    "a folder without a pipeline": (["--model", "modules"], "no pipeline"),
    "output is a file": (["--output", "README.md"], "cannot write to the folder README.md"),
}


def test_bad_input(scripts, capsys):
    for case, (arguments, sentence) in BAD.items():
        assert sentence in refusal(scripts, capsys, *arguments), case


def test_a_refusal_imports_no_engine(tmp_path):
    """A process of its own is refused before torch, diffusers or transformers are imported."""
    Image.new("RGB", (900, 100)).save(tmp_path / "long.png")
    code = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    picture = ("--image", tmp_path / "long.png")
    assert "at most 8 times" in refused("python", "-c", code, SCRIPT, *picture, PROFILE="cpu")


def test_damaged_and_missing_weights(scripts, tiny, tmp_path, capsys):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", tiny, copy], check=True)
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert "not fully downloaded" in refusal(scripts, capsys, "--model", copy)
    file.write_bytes(b"no")
    assert "not fully downloaded" in refusal(scripts, capsys, "--model", copy)
    file.write_bytes((tiny / "vae" / file.name).read_bytes())
    (copy / "vae" / "config.json").write_text("{")
    assert "cannot be loaded" in refusal(scripts, capsys, "--model", copy)
    file.unlink()
    assert "no weights in vae/" in refusal(scripts, capsys, "--model", copy)


def test_a_recipe_that_does_not_fit(scripts, tiny, tmp_path, capsys):
    """A transformer of 1 TB (a file with a hole): refused before anything is loaded, with the
    numbers.
    """
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", tiny, copy], check=True)
    for file in (copy / "transformer").glob("*.safetensors"):
        file.unlink()
    header = json.dumps(
        {"w": {"dtype": "BF16", "shape": [10**6, 5 * 10**5], "data_offsets": [0, 10**12]}}
    ).encode()
    with (copy / "transformer" / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", len(header)) + header)
        f.truncate(8 + len(header) + 10**12)
    sentence = refusal(scripts, capsys, "--model", copy, "--output", tmp_path / "out")
    assert (
        re.search(r"recipe plain does not fit: it needs 1864\.\d GiB on host", sentence)
        and "no recipe fits this machine" in sentence
    )
    assert list((tmp_path / "out").iterdir()) == []


def test_interrupted_run(tiny, tmp_path):
    """Ctrl+C while it denoises: exit code 130, one sentence, the earlier picture as it was, no
    process, no partial file.
    """
    Image.new("RGB", (8, 8), "red").save(tmp_path / "output.png")
    before = (tmp_path / "output.png").read_bytes()
    command = [sys.executable, SCRIPT, "--model", tiny, "--output", tmp_path, "--steps", "5000"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT | {"PROFILE": "cpu"},
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    shown = ""
    while "/5000 [" not in shown or " 0/5000" in shown[-60:]:
        piece = process.stderr.read(40)
        assert piece, shown
        shown += piece
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=300)[1]
    assert (
        process.returncode == 130 and "Traceback" not in rest and rest.count("interrupted:") == 1
    ), rest[-2000:]
    assert [f.name for f in tmp_path.iterdir()] == ["output.png"] and (
        tmp_path / "output.png"
    ).read_bytes() == before


def test_interrupted_build(scripts, small_model, tmp_path):
    """Interrupted at any moment, building a model leaves the whole folder or nothing."""

    def interrupt(*_):
        raise KeyboardInterrupt

    scripts["random_model"].build(
        "tiny", tmp_path / "first"
    )  # so that what is interrupted below is no import
    old = signal.signal(signal.SIGALRM, interrupt)
    seen = set()
    try:
        for number, delay in enumerate(itertools.chain(range(40, 700, 60), [0])):
            folder = tmp_path / f"m{number}"
            # RuntimeError: interrupted while torch enters or leaves the meta device
            allowed = (KeyboardInterrupt, RuntimeError) if delay else ()
            with contextlib.suppress(*allowed):
                try:
                    signal.setitimer(signal.ITIMER_REAL, delay / 1000)
                    scripts["random_model"].build("tiny", folder)
                finally:
                    signal.setitimer(
                        signal.ITIMER_REAL, 0
                    )  # the last moment at which it can still come, within `suppress`
            seen.add(folder.exists())
            assert not folder.exists() or (folder / "model_index.json").is_file()
            assert not list(tmp_path.glob(".m*")), delay
    finally:
        signal.signal(signal.SIGALRM, old)
    assert seen == {True, False}, "the interruptions came too early or too late to prove anything"


def test_random_model_refusals(tmp_path):
    script = MODULE / "random_model.py"
    assert "exists already" in refused("python", script, "tiny", tmp_path)
    assert "no tokenizer in" in refused(
        "python", script, "tiny", tmp_path / "x", "--tokenizer", tmp_path
    )
    assert "random weights" in python(script, "--help", check=0).stdout
