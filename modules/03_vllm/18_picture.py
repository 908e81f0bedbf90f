"""A picture in the request: the openai package, the picture inside the message as base64.

    make vllm-serve RECIPE=qwen3-vl-8b-tp2     # a model that sees
    make vllm-picture
    python modules/03_vllm/18_picture.py --image my.jpg --prompt "What does the sign say?"

Look at: the tokens in. The picture is read as so many of them, and each takes its place in the KV
cache, as a word does: half the side is a quarter of the tokens.
"""

import argparse
import base64
import io
import os
from pathlib import Path

from lab import engine, fail, results
from lab.profile import load_profile


def draw(side: int) -> bytes:
    """A PNG of side x side pixels: a red circle on the left, a blue square on the right."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(picture)
    top, bottom = side // 3, 2 * side // 3
    pen.ellipse((side // 9, top, 4 * side // 9, bottom), fill="red")
    pen.rectangle((5 * side // 9, top, 8 * side // 9, bottom), fill="blue")
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def read(path: str) -> tuple[bytes, str]:
    """The bytes of a picture's file, and its kind as the message names it."""
    kinds = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    kind = kinds.get(Path(path).suffix.lower())
    if kind is None:
        fail(f"{path} is no picture that is sent here: give a {', '.join(kinds)} file")
    try:
        return Path(path).read_bytes(), kind
    except OSError as e:
        fail(f"cannot read {path}: {e.strerror}")


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engine.add_address_flag(parser, profile)
    parser.add_argument("--image", help="a PNG, JPEG or WebP file (default: one is drawn)")
    parser.add_argument(
        "--side", type=int, default=448, help="pixels of the drawn picture (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt",
        default="Which shapes are in the picture, and which colours do they have?",
        help="what to ask (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.side < 28:
        fail(f"--side {args.side} is too small to draw on: at least 28")
    picture, kind = read(args.image) if args.image else (draw(args.side), "png")

    import openai

    key = os.environ.get("VLLM_API_KEY", "unused")
    client = openai.OpenAI(base_url=f"{args.address}/v1", api_key=key, max_retries=0)
    model = engine.served_model(client).id

    # -----------------------------------------------------------------------------
    # 1. The message: a list of parts, the picture as a data: address

    address = f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
    question = {"type": "text", "text": args.prompt}
    seen = {"type": "image_url", "image_url": {"url": address}}

    def ask(parts: list[dict], most_tokens: int):
        messages = [{"role": "user", "content": parts}]
        options = {"model": model, "max_tokens": most_tokens, "temperature": 0}
        return client.chat.completions.create(messages=messages, **options)

    # -----------------------------------------------------------------------------
    # 2. Ask with it and without: the difference is what the picture costs

    try:
        reply = ask([seen, question], 100)
        blind = ask([question], 1)
    except openai.NotFoundError:
        fail(f"{model} is served for vectors or scores, not to answer: 'make stop' it first")
    except openai.APIStatusError as e:
        reason = e.body.get("message", e) if isinstance(e.body, dict) else e
        fail(f"the server refused the picture: {reason}")
    tokens = reply.usage.prompt_tokens - blind.usage.prompt_tokens
    print(f"{model} > {args.prompt}\n< {reply.choices[0].message.content}")
    print(f"\n{reply.usage.prompt_tokens} tokens in, {tokens} of them the picture")
    results.note(results.name_of(__file__))


if __name__ == "__main__":
    main()
