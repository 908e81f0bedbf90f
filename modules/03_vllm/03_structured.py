"""Answers that a program can read: JSON by a schema, and calls of your own functions (tool calls).

The engine sets the logits of every token that would break the schema to minus infinity, so the
*form* is right by construction, also from a model of 135M. What stands in it is still the model's
own: right form, wrong content is possible.

    make vllm-serve                                          # first, if it is not running
    make vllm-structured
    make vllm-structured ARGS='--text "Bob, 41, moved to Oslo."'

Look at: the JSON parses though nobody asked for JSON in words; the call names a function of this
script with arguments of its type; the function's result goes back as a message with role `tool`,
from which a model that was taught tools answers (SmolLM2 was not).
"""

import argparse
import json
import os

from lab import engine, fail, models, results
from lab.planner import serving
from lab.planner.config import read
from lab.profile import load_profile

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "city": {"type": "string", "maxLength": 20},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}


# What it may be asked about: the models of the course
MODELS = [name for name in models.catalogue() if name.startswith(("smollm2-", "qwen2.5-"))]
# The function that the model may call, as it is described to the model
TOOL = {
    "type": "function",
    "function": {
        "name": "kv_bytes_per_token",
        "description": "bytes of KV cache a token takes",
        "parameters": {
            "type": "object",
            "properties": {"model": {"enum": MODELS}},
            "required": ["model"],
            "additionalProperties": False,
        },
    },
}


def kv_bytes_per_token(model: str) -> int:
    """Bytes of KV cache that one token of `model` takes in bf16."""
    return serving.kv_bytes_per_token(read(models.config(model)))


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engine.add_address_flag(parser, profile)
    parser.add_argument(
        "--text",
        default="Alice is 30 years old and lives in Paris.",
        help="from which name, age and city are read (default: %(default)s)",
    )
    parser.add_argument(
        "--about",
        default="smollm2-135m",
        choices=MODELS,
        help="model to ask about (default: %(default)s)",
    )
    args = parser.parse_args()
    if not args.text.strip():
        fail("the text is empty: say something with --text")

    import openai

    key = os.environ.get("VLLM_API_KEY", "unused")
    client = openai.OpenAI(base_url=f"{args.address}/v1", api_key=key, max_retries=0)

    try:
        model = client.models.list().data[0].id

        def ask(messages: list, **options):
            """The server's answer: a message with `content`, or with `tool_calls`."""
            options |= {"model": model, "messages": messages, "temperature": 0}
            return client.chat.completions.create(**options).choices[0].message

        # -----------------------------------------------------------------------------
        # 1. JSON by a schema

        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
        messages = [{"role": "user", "content": args.text}]
        reply = ask(messages, max_tokens=200, response_format=form)
        person = json.loads(reply.content)
        print(f"text    {args.text}")
        print(f"JSON    {json.dumps(person, ensure_ascii=False)}")

        # -----------------------------------------------------------------------------
        # 2. A tool call: the model chooses the arguments, we run the function, the model reads its
        # result

        question = f"How many bytes of KV cache does one token of {args.about} take?"
        messages = [{"role": "user", "content": question}]
        # `required` also makes a model call that was never taught to; a large one may be left to
        # decide ("auto").
        reply = ask(messages, max_tokens=100, tools=[TOOL], tool_choice="required")
        call = reply.tool_calls[0]
        value = kv_bytes_per_token(**json.loads(call.function.arguments))
        result = {"role": "tool", "tool_call_id": call.id, "content": f"{value} bytes"}
        messages += [reply.model_dump(exclude_none=True), result]
        answer = ask(messages, max_tokens=60).content
    except openai.APIConnectionError:
        fail(f"no server answers at {args.address}: start one with 'make vllm-serve'")
    except openai.APIStatusError as e:
        reason = e.body.get("message", e) if isinstance(e.body, dict) else e
        fail(f"the server refused the request: {reason}")
    print(f"\nuser    {question}")
    print(f"call    {call.function.name}({call.function.arguments})")
    print(f"result  {value} bytes")
    print(f"answer  {answer.strip()}")
    results.note(results.name_of(__file__))


if __name__ == "__main__":
    main()
