"""Values of a config.json, each read as what it should be or refused in one sentence."""

import re

from lab import fail

LARGEST = 10**9  # no size in a config.json is larger
TRUE = (True, "true", "True", 1)
FALSE = (False, "false", "False", 0, None)


class Values:
    """A config.json, or a section of one, and the name that its messages use.

    Raises SystemExit(2) with one sentence for a value that is not what it should be.
    """

    def __init__(self, values: dict, name: str) -> None:
        self.values = values
        self.name = name

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def refuse(self, key: str, must: str) -> None:
        value = str(self.values.get(key, "nothing"))
        shown = value if len(value) <= 60 else value[:60] + " ..."
        fail(f"the config.json of {self.name} says {key} = {shown}: it must be {must}")

    def number(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """The whole number under the first of `keys` that is there; "4096" and 4096.0 are read.

        >>> Values({"hidden_size": "4096"}, "a model").number("hidden_size")
        4096
        """
        key = next((key for key in keys if self.has(key)), keys[0])
        value = self.values.get(key)
        if value is None:
            value = default
        if isinstance(value, str) and value.strip().isdecimal():
            value = int(value.strip()[:20])
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < LARGEST:
            self.refuse(key, f"a whole number, at least {least} and below {LARGEST:g}")
        return value

    def decimal(self, key: str, default: float) -> float:
        """A number above 0, whole or not."""
        value = self.values.get(key)
        if value is None:
            value = default
        if isinstance(value, str) and re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value, re.ASCII):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(key, "a number above 0")
        if not 0 < value < LARGEST:
            self.refuse(key, "a number above 0")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key, default)
        if isinstance(value, list | dict) or value not in (*TRUE, *FALSE):
            self.refuse(key, "true or false")
        return value in TRUE

    def text(self, key: str, default: str = "") -> str:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.refuse(key, "a word")
        return value

    def section(self, key: str) -> "Values":
        """An object in the object; an empty one where it is absent."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            self.refuse(key, "an object with keys and values")
        return Values(value, self.name)

    def words(self, key: str) -> list[str]:
        """A list of words; a single one is a list of one."""
        value = self.values.get(key)
        if value is None:
            return []
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.refuse(key, "a list of words")
        return value

    def numbers(self, key: str) -> list[int]:
        """A list of whole numbers."""
        value = self.values.get(key)
        if value is None:
            return []
        counts = isinstance(value, list) and all(type(item) is int for item in value)
        if not counts:
            self.refuse(key, "a list of whole numbers")
        return value
