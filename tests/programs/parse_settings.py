"""LLaMA-Factory's own parser on settings: what it understood, or the words of its refusal.

    parse_settings.py '{"NAME": {SETTING: VALUE, ...}, ...}'

Prints one JSON object with the same names.
"""

import json
import sys

from llamafactory.hparams import parser
from transformers import HfArgumentParser


def parsed(settings: dict) -> dict | str:
    arguments = parser._TRAIN_ARGS if "stage" in settings else parser._INFER_ARGS
    try:
        parts = HfArgumentParser(arguments).parse_dict(settings)
    except ValueError as e:
        return str(e)
    understood = {}
    for part in parts:
        understood |= {key: value for key, value in vars(part).items() if key in settings}
    return {key: getattr(value, "value", value) for key, value in understood.items()}


cases = json.loads(sys.argv[1])
print(json.dumps({name: parsed(settings) for name, settings in cases.items()}))
