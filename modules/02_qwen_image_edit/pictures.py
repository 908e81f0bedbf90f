"""The picture that is edited, and those that are written."""

from pathlib import Path

from lab import fail, shown


def drawn(size: int):
    """A red circle and a blue square, on a grid of 16 x 16."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (size, size), "#f4efe4")
    pen = ImageDraw.Draw(picture)
    unit = size / 16
    pen.ellipse([unit * place for place in (2, 4, 8, 10)], fill="#d03a2f")
    pen.rectangle([unit * place for place in (9, 7, 14, 12)], fill="#2f5fd0")
    return picture


def given(path: Path | None, size: int):
    """The picture in the file, or the drawn one."""
    if path is None:
        return drawn(size)
    if not path.is_file():
        fail(f"there is no picture {shown(path)}")
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as e:
        reason = str(e).splitlines()[0][:80]
        fail(
            f"{shown(path)} is not a picture that can be read ({reason}): "
            "give a PNG, JPEG or WebP file"
        )
    if max(image.size) > 8 * min(image.size):
        fail(
            f"{shown(path)} is {image.width} x {image.height}: "
            "one side may be at most 8 times the other, crop it first"
        )
    return image


def side_by_side(left, right, height: int = 384):
    """Both pictures at this height, with a white gap of 8 pixels."""
    from PIL import Image

    left = left.resize((round(height * left.width / left.height), height))
    right = right.resize((round(height * right.width / right.height), height))
    pair = Image.new("RGB", (left.width + 8 + right.width, height), "white")
    pair.paste(left, (0, 0))
    pair.paste(right, (left.width + 8, 0))
    return pair


def save(picture, file: Path) -> None:
    """Write the picture whole: an interrupted run leaves the earlier one."""
    partial = file.with_name(f".{file.name}.tmp")
    try:
        picture.save(partial, format="PNG")
        partial.replace(file)
    except OSError as e:
        fail(f"cannot write to the folder {shown(file.parent)}: {e.strerror}")
