"""LLaMA-Factory's web UI as a reader's hand and eyes meet it, in a browser; its API with a key.

One short training of a tiny model, begun by the page's button; Chat and API answer with what it
left.
"""

import json
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request

import psutil
import pytest
import yaml
from browser import Page
from conftest import PATIENCE, python, run
from test_llamafactory import SYSTEM, TRAIN, greedy, living, ours, prompts

from lab import RUNS, jobs

FOLDER = RUNS / "06_LLaMA-Factory/webui"
ADDRESS = "http://127.0.0.1:7860"
ANSWER_TOKENS = 60
KEY = "a-key-of-the-tests"


# -----------------------------------------------------------------------------
# What is on the page, as JavaScript that finds it


def shown(kind: str, condition: str) -> str:
    """The last visible element of a kind (CSS) that meets a condition on `e`."""
    return f"[...document.querySelectorAll('{kind}')].findLast(e => e.offsetParent && {condition})"


def button(words: str) -> str:
    return shown("button", f"e.innerText.trim() == {json.dumps(words)}")


def field(label: str) -> str:
    """By its label: a drop-down list, a slider's number or a line of text."""
    own = "e.closest('label')?.querySelector('[data-testid=block-info]')?.innerText"
    name = f"(e.ariaLabel ?? {own} ?? '').replace('number input for ', '').trim()"
    return shown("input, textarea", f"{name} == {json.dumps(label)}")


def empty(placeholder: str) -> str:
    return shown("textarea", f"e.placeholder == {json.dumps(placeholder)}")


def choice(beginning: str) -> str:
    return shown("[role=option]", f"e.innerText.trim().startsWith({json.dumps(beginning)})")


def load_settings(page: Page) -> None:
    page.write(field("配置路径"), "lf-train.yaml")
    page.press("Enter", "\r")
    page.click(button("载入训练参数"))
    page.shows("训练参数已载入")


# -----------------------------------------------------------------------------
# One server, one page, one training


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page as it opens for the first time."""
    run("make", "stop", check=0)
    shutil.rmtree(FOLDER, ignore_errors=True)
    out = run("make", "lf-webui", check=0).stdout
    assert ADDRESS in out
    with Page(tmp_path_factory.mktemp("browser")) as page:
        page.open(ADDRESS)
        page.until(f"({field('配置路径')})?.value.endsWith('.yaml')")
        yield page
    run("make", "stop", check=0)
    assert not ours()


@pytest.fixture(scope="module")
def trained(page, tiny_model):
    """The folder that a training begun by the button wrote: `make lf-train`'s, but of the tiny
    model, shorter, and with a rate that a model without content feels.
    """
    load_settings(page)
    page.write(field("模型路径"), str(tiny_model))
    page.write(field("最大样本数"), "64")
    page.write(field("学习率"), "0.02")
    name = page.value(f"{field('输出目录')}.value")
    page.click(button("开始"))
    page.until("/训练完毕|训练出错/.test(document.body.innerText)")
    assert "训练完毕" in page.text(), page.text()[-3000:]
    return FOLDER / "saves/Custom/lora" / name


def losses(folder) -> list[float]:
    lines = map(json.loads, (folder / "trainer_log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.needs("chromium")
def test_the_page_is_chinese_and_ready(page):
    """Labels, our data sets, the profile's model; nothing of it is asked of a third machine."""
    for words in ("模型路径", "微调方法", "数据集", "载入训练参数", "开始", "中断", "损失"):
        page.shows(words)
    assert page.value(f"{field('模型路径')}.value") == str(RUNS / "models/smollm2-135m")
    page.click(field("数据集"))
    page.until(f"!!({choice('launch_en_train')})")
    hosts = {urllib.parse.urlsplit(url).hostname for url in page.asked if url[:4] == "http"}
    # The page names two that it can do without: here they cannot be found.
    assert hosts <= {"127.0.0.1", "cdnjs.cloudflare.com", "fonts.googleapis.com"}


@pytest.mark.needs("chromium")
def test_the_settings_are_those_of_lf_train(trained):
    """Each setting of `make lf-train` that the reader has not changed reaches the training; code
    beside a model's weights is not trusted.
    """
    text = python(TRAIN, "--dry-run", PROFILE="cpu", check=0).stdout.rpartition("\n\n")[0]
    given = yaml.safe_load((trained / "training_args.yaml").read_text())
    changed = {"model_name_or_path", "max_samples", "learning_rate"}
    places = {"dataset_dir", "output_dir", "overwrite_output_dir", "overwrite_cache"}
    left_out = changed | places | {"enable_jit_checkpoint"}
    expected = {key: value for key, value in yaml.safe_load(text).items() if key not in left_out}
    off = {key for key, value in expected.items() if value is False}  # the page leaves them out
    assert not off & given.keys()
    assert {key: given[key] for key in expected.keys() - off} == {
        key: expected[key] for key in expected.keys() - off
    }
    assert given["default_system"] == SYSTEM
    assert "trust_remote_code" not in given and "bf16" not in given


@pytest.mark.needs("chromium")
def test_a_training_by_mouse(page, trained):
    """The adapter is on the disk, its loss has fallen, and its curve is on the page."""
    assert (trained / "adapter_model.safetensors").is_file()
    first, *_, last = losses(trained)
    assert first > last + 0.1
    picture = shown("img", "e.closest('.block')?.innerText.trim() == '损失'")
    size = page.until(f"({picture})?.naturalWidth")
    assert size > 300


@pytest.fixture(scope="module")
def answer(page, trained, tiny_model) -> str:
    """What the page's Chat answers with the trained adapter."""
    page.click(field("检查点路径"))
    page.settle()  # the server sends the list anew, and empties the field
    page.click(choice(trained.name))
    page.press("Escape")  # the list would lie over what is clicked next
    page.click(button("Chat"))
    page.click(button("加载模型"))
    page.until(f"!!({shown('textarea', 'e.value.startsWith(`模型已加载`)')})")
    page.write(empty("系统提示词（非必填）"), SYSTEM)
    page.write(field("最大生成长度"), str(ANSWER_TOKENS))
    page.write(field("Top-p 采样值"), "0.01")
    page.write(empty("输入..."), prompts(1)[0])
    page.click(button("提交"))
    text = "(document.querySelector('[data-testid=bot]')?.innerText ?? '')"
    page.until(f"{text}.length > 10")  # it streams: more may follow
    return page.value(text)


def begins(seen: str, whole: str) -> bool:
    """Whether `whole` begins so, but for what a page makes of blanks and Markdown's signs."""
    letters, all_letters = (re.sub(r"[\W_]", "", text) for text in (seen, whole))
    shorter = min(len(letters), len(all_letters))
    return shorter > 4 and letters[:shorter] == all_letters[:shorter]


@pytest.mark.needs("chromium")
def test_chat_answers_with_the_adapter(answer, trained, tiny_model):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, trained).eval()
    (tokens,) = greedy(tuned, tokenizer, prompts(1))
    with tuned.disable_adapter():
        (untrained,) = greedy(tuned, tokenizer, prompts(1))
    assert begins(answer, tokenizer.decode(tokens, skip_special_tokens=True))
    assert not begins(answer, tokenizer.decode(untrained, skip_special_tokens=True))


def start_in(page: Page, output: str) -> None:
    """Another training, into a folder of this name."""
    page.click(button("Train"))
    page.write(field("输出目录"), output)
    page.press("Enter", "\r")
    page.write(field("最大样本数"), "300")
    page.click(button("开始"))


@pytest.mark.long
@pytest.mark.needs("chromium")
def test_a_training_is_interrupted(page, trained):
    """中断 ends it after the step it is in; what it has learnt is saved, and no process stays."""
    start_in(page, "interrupted")
    folder = trained.parent / "interrupted"
    deadline = time.monotonic() + PATIENCE
    while not (folder / "trainer_log.jsonl").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    page.click(button("中断"))
    page.shows("训练完毕")
    ended = json.loads((folder / "trainer_state.json").read_text())
    assert 0 < ended["global_step"] < ended["max_steps"]
    assert (folder / "adapter_model.safetensors").is_file()
    assert len(jobs.members(jobs.running()["lf-webui"])) == 1


def addresses(name: str) -> set[str]:
    """Where the processes of a job listen."""
    processes = jobs.members(jobs.running()[name])
    sockets = [socket for each in processes for socket in each.net_connections()]
    return {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}


@pytest.mark.needs("chromium")
def test_stop_in_the_middle_of_a_training(page, trained):
    """Page and training listen on loopback at most, and `make stop` ends both."""
    start_in(page, "stopped")
    while len(members := jobs.members(jobs.running()["lf-webui"])) < 2:
        time.sleep(0.1)
    assert addresses("lf-webui") == {"127.0.0.1"}
    run("make", "stop", check=0)
    assert not living(members)


# -----------------------------------------------------------------------------
# The API


def status(key: str | None) -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request("http://127.0.0.1:8010/v1/models", headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=PATIENCE).status
    except urllib.error.HTTPError as refusal:
        return refusal.code


@pytest.mark.needs("chromium")
def test_the_api_asks_for_its_key(trained, answer):
    """What the page trained is served; who does not send the key gets nothing, and the key is not
    said anywhere.
    """
    run("make", "stop", check=0)
    shutil.copy(trained / "training_args.yaml", trained / "config.yaml")
    out = run("make", "lf-api", f"ARGS=--adapter {trained}", API_KEY=KEY, check=0).stdout
    assert addresses("lf-api") == {"127.0.0.1"}
    assert [status(key) for key in (None, "another", KEY)] == [401, 401, 200]
    body = {"model": "tuned", "messages": [{"role": "user", "content": prompts(1)[0]}]}
    call = urllib.request.Request(
        "http://127.0.0.1:8010/v1/chat/completions",
        json.dumps(body | {"max_tokens": ANSWER_TOKENS}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )
    reply = json.load(urllib.request.urlopen(call, timeout=PATIENCE))
    assert begins(answer, reply["choices"][0]["message"]["content"])
    written = [(RUNS / "06_LLaMA-Factory/api.log"), jobs.FOLDER / "lf-api.json"]
    assert "API_KEY" in out
    assert not any(KEY in text for text in (out, *(file.read_text() for file in written)))
    run("make", "stop", check=0)
    assert not ours()
