"""A stand-in for NVIDIA's pynvml: FAKE_CARDS describes the cards.

Put this folder on PYTHONPATH.

    FAKE_CARDS='[{"name": "NVIDIA GeForce RTX 4090", "memory_gib": 23.99, "capability": [8, 9]}]'

Unset or empty, there is no driver: nvmlInit raises, as it does on a machine without one. Only what
the project calls is here; anything else raises AttributeError, so that a test sees a new call.
"""

import json
import os
from types import SimpleNamespace


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


nvmlClocksThrottleReasonSwThermalSlowdown = 0x20
nvmlClocksThrottleReasonHwThermalSlowdown = 0x40
nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 0x80
NVML_TEMPERATURE_GPU = 0
nvmlMemory_v2 = 0x2000028


MEMORY = {
    "memory": 24,
    "used": 0,
    "reserved": 0.35,
}  # GiB of a card that FAKE_CARDS says nothing else of


def _cards() -> list[dict]:
    return json.loads(os.environ.get("FAKE_CARDS") or "[]")


def nvmlInit():
    if problem := os.environ.get("FAKE_NVML_ERROR"):
        raise NVMLError(problem)
    if not _cards():
        raise NVMLError("Driver Not Loaded")


def nvmlShutdown():
    pass


def nvmlDeviceGetCount():
    return len(_cards())


def nvmlDeviceGetHandleByIndex(index):
    cards = _cards()
    if index >= len(cards):
        raise NVMLError("Invalid Argument")
    return index


def nvmlDeviceGetUUID(handle):
    return _cards()[handle].get("uuid", f"GPU-{handle:08d}-0000-0000-0000-000000000000")


def nvmlDeviceGetHandleByUUID(uuid):
    uuid = uuid.decode() if isinstance(uuid, bytes) else uuid
    for handle in range(len(_cards())):
        if nvmlDeviceGetUUID(handle) == uuid:
            return handle
    raise NVMLError("Not Found")


def nvmlDeviceGetIndex(handle):
    return handle


def nvmlDeviceGetName(handle):
    return _cards()[handle]["name"]


def nvmlDeviceGetMemoryInfo(handle, version=None):
    card = _cards()[handle]
    total, used, reserved = (
        int(card.get(f"{kind}_gib", default) * 2**30) for kind, default in MEMORY.items()
    )
    return SimpleNamespace(
        version=version, total=total, used=used, free=total - used - reserved, reserved=reserved
    )


def nvmlDeviceGetCudaComputeCapability(handle):
    return tuple(_cards()[handle].get("capability", (8, 9)))


def nvmlSystemGetDriverVersion():
    return os.environ.get("FAKE_DRIVER", "580.95.05")


def nvmlSystemGetCudaDriverVersion():
    return int(os.environ.get("FAKE_CUDA", "13000"))


def nvmlDeviceGetComputeRunningProcesses(handle):
    return [
        SimpleNamespace(pid=process["pid"], usedGpuMemory=int(process["gib"] * 2**30))
        for process in _cards()[handle].get("processes", [])
    ]


nvmlDeviceGetGraphicsRunningProcesses = nvmlDeviceGetComputeRunningProcesses


def nvmlDeviceGetPciInfo(handle):
    return SimpleNamespace(busId=f"00000000:{handle + 1:02X}:00.0")


# Of a busy card that FAKE_CARDS says nothing else of: x8 of PCIe 4 x16, at its power limit.
BUSY = {"generation": 4, "lanes": 8, "watts": 449, "limit": 450, "celsius": 70, "reasons": 4}


def _busy(handle, key):
    return (BUSY | _cards()[handle].get("busy", {}))[key]


def nvmlDeviceGetCurrPcieLinkGeneration(handle):
    return _busy(handle, "generation")


def nvmlDeviceGetCurrPcieLinkWidth(handle):
    return _busy(handle, "lanes")


def nvmlDeviceGetMaxPcieLinkGeneration(handle):
    return 4


def nvmlDeviceGetMaxPcieLinkWidth(handle):
    return 16


def nvmlDeviceGetPowerUsage(handle):
    return 1000 * _busy(handle, "watts")


def nvmlDeviceGetEnforcedPowerLimit(handle):
    return 1000 * _busy(handle, "limit")


def nvmlDeviceGetPowerManagementDefaultLimit(handle):
    return 450_000


def nvmlDeviceGetTemperature(handle, sensor):
    return _busy(handle, "celsius")


def nvmlDeviceGetCurrentClocksThrottleReasons(handle):
    return _busy(handle, "reasons")
