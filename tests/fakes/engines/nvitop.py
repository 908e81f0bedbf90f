"""Stand-in for nvitop: idle cards, as many as FAKE_CARDS describes."""

import json
import os


class Device:
    def __init__(self, index: int | None = None, uuid: str | None = None):
        """A card by either name; one is like another."""

    gpu_utilization = staticmethod(lambda: 0)
    memory_used = staticmethod(lambda: 2**30)
    power_usage = staticmethod(lambda: 20_000)


class _Cuda:
    @staticmethod
    def all() -> list[Device]:
        return [Device(i) for i in range(len(json.loads(os.environ["FAKE_CARDS"])))]


Device.cuda = _Cuda
