"""A Triton kernel on each device given, its numbers compared: vLLM samples by such kernels.

    python scripts/doctor_checks/triton_kernel.py cuda:0 cuda:1

The first launch compiles C against Python.h.
"""

import sys

import torch
import triton
import triton.language as tl


@triton.jit
def double(source, target, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    tl.store(target + offsets, tl.load(source + offsets, mask=inside) * 2, mask=inside)


for device in sys.argv[1:]:
    if device != "cpu":  # on a CPU only with TRITON_INTERPRET=1
        torch.cuda.set_device(device)
    numbers = torch.arange(1000, dtype=torch.float32, device=device)
    doubled = torch.empty_like(numbers)
    double[(8,)](numbers, doubled, 1000, BLOCK=128)
    assert torch.equal(doubled, numbers * 2), f"wrong numbers on {device}"
print(f"Triton {triton.__version__}: a kernel compiled and right on {len(sys.argv) - 1} device(s)")
