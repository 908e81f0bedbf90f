"""Ollama's Modelfile for a GGUF: the model's own chat template once more, in Go's language.

Ollama does not run the Jinja template that a GGUF carries. A Modelfile's reference: docs/modelfile
of the ollama repository; the template's language: text/template of Go.
"""

import re

# Ollama gives .Messages, and in .System all system messages of them, "" where there are none.
DEFAULT_SYSTEM = """{{ if not .System }}<|im_start|>system
DEFAULT<|im_end|>
{{ end }}"""
CHATML = """{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
PROBES = (
    [{"role": "user", "content": "One?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}],
    [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": " Three?\n"},
    ],
)
# What the Go template's actions are in Jinja, which runs here
AS_JINJA = {
    "if not .System": "{% if not system %}",
    "range .Messages": "{% for message in messages %}",
    ".Role": "{{ message.role }}",
    ".Content": "{{ message.content }}",
}
ENDS = {"if": "{% endif %}", "range": "{% endfor %}"}


def go_template(default_system: str | None, tokenizer) -> str | None:
    """The TEMPLATE that gives the prompts of the model's own chat template.

    `default_system` is what that one says where nobody gave a system message, None where it is not
    ChatML. None where no such TEMPLATE is known: each of PROBES is rendered both ways.
    """
    if default_system is None:
        return None
    begin = DEFAULT_SYSTEM.replace("DEFAULT", default_system) if default_system else ""
    template = begin + CHATML
    for messages in PROBES:
        own = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if as_ollama(template, messages) != own:
            return None
    return template


def as_ollama(template: str, messages: list[dict]) -> str:
    """The prompt that Ollama makes of the messages, by the few actions of Go that are used here."""
    from jinja2 import Environment

    opened = []

    def translated(action: re.Match) -> str:
        text = action[1]
        if text == "end":
            return ENDS[opened.pop()]
        if " " in text:
            opened.append(text.split()[0])
        return AS_JINJA[text]

    jinja = re.sub(r"\{\{ (.*?) \}\}", translated, template)
    system = "\n\n".join(each["content"] for each in messages if each["role"] == "system")
    environment = Environment(keep_trailing_newline=True, autoescape=False)
    return environment.from_string(jinja).render(system=system, messages=messages)


def text(gguf_name: str, template: str, stop: str) -> str:
    """The Modelfile of the GGUF file beside it: greedy answers that end where the model ends."""
    return (
        f'FROM ./{gguf_name}\n\nTEMPLATE """{template}"""\n\n'
        f'PARAMETER stop "{stop}"\n'
        "PARAMETER temperature 0\n"
        "PARAMETER repeat_penalty 1\n"  # some versions take 1.1, which changes greedy answers too
    )
