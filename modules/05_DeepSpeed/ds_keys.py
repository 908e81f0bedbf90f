"""Which keys of a configuration DeepSpeed's own parser asks for, and what it takes without them.

Most sections it reads key by key, by get, and says nothing of the others: a misspelt key is as if
it were not there, and a text in the place of a number is found in the first step that counts with
it.
"""

import difflib
import json

# Keys in LLaMA-Factory's examples that no DeepSpeed reads; they stand for nothing.
HARMLESS = {"comms_config", "monitor_config"}
# Sections that a model of pydantic judges, which refuses a key that it does not know.
JUDGED = {"zero_optimization", "bf16", "fp16"}


class Asked(dict):
    """A dictionary that remembers what somebody asked it for, and so do those within it.

    `asked`: {key: the value that whoever asked takes where the key is not there}.
    """

    def __init__(self, values: dict, taken_whole=()):
        watched = {
            key: Asked(value) if isinstance(value, dict) and key not in taken_whole else value
            for key, value in values.items()
        }
        super().__init__(watched)
        self.asked = {}  # copy.copy, which DeepSpeed makes, shares it

    def __getitem__(self, key):
        self.asked.setdefault(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked[key] = self.asked.get(key) if default is None else default
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.setdefault(key)
        return super().__contains__(key)

    def sections(self, path: tuple[str, ...] = ()):
        """(path, section) of this one and those within it of which some key was asked for.

        The others are taken whole: by a model of pydantic, or by an optimizer.
        """
        if self.asked:
            yield path, self
        for key, value in self.items():
            if isinstance(value, Asked):
                yield from value.sections((*path, key))


def alike(name: str, known) -> str:
    """`, did you mean ...?` where a known name is much like this one."""
    names = {other.lower(): other for other in known}
    nearest = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.75)
    return f": did you mean {names[nearest[0]]}?" if nearest else ""


def watched(values: dict) -> Asked:
    """The whole configuration for the parser, which knows no number of processes here."""
    whole = {key: value for key, value in values.items() if key != "train_batch_size"}
    return Asked(whole, JUDGED)


def refuse_unread(config, settings: Asked) -> None:
    """A key that was not asked for, where others of its section were."""
    for path, section in settings.sections():
        unread = [key for key in section if key not in section.asked.keys() | HARMLESS]
        unread = [key for key in unread if key[:1] != "_"]  # a comment
        if unread and path[:1] != ("data_efficiency",):
            names = ", ".join(".".join([*path, key]) for key in unread)
            known = alike(unread[0], section.asked) or ": correct the name, or take it out"
            config.refuse(f"DeepSpeed never reads {names}{known}")


def refuse_other_types(config, settings: Asked) -> None:
    """A number or a text where the parser's own value is a boolean; a text for a number."""
    for path, section in settings.sections():
        for key in section.asked.keys() & section.keys():
            value = dict.get(section, key)
            if value is None or isinstance(value, dict):
                continue
            default = section.asked[key]
            if key == "steps_per_print":
                default = 10  # it takes None: it then never prints
            name = ".".join([*path, key])
            if isinstance(default, bool) and not isinstance(value, bool):
                config.refuse(f"{name} is {json.dumps(value)}: write true or false")
            if type(default) in (int, float) and type(value) not in (int, float):
                config.refuse(f"{name} is {json.dumps(value)}: write a number")
