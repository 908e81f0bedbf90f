"""Import each package in turn, in one process: a line of JSON, {package: "" or its traceback}.

import_each.py PACKAGE [PACKAGE ...]
"""

import importlib
import json
import sys
import traceback

outcomes = {}
for package in sys.argv[1:]:
    try:
        importlib.import_module(package)
        outcomes[package] = ""
    except BaseException:
        outcomes[package] = traceback.format_exc()
print(json.dumps(outcomes))
