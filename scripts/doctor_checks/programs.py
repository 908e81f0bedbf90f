"""What the doctor runs in processes of their own.

    python scripts/doctor_checks/programs.py NAME [ARG ...]

Each function is one program. Its last line is what the doctor reports; an exception, a crash and
a hang are findings, too.
"""

import os
import sys
import time


def cuda_of_torch():
    """The CUDA version that torch was built for, "None" for a build without."""
    import torch

    print(torch.version.cuda)


def cuda_kernel():
    """A sum of known result on every card: torch's CUDA version and the number of cards."""
    import torch

    for index in range(torch.cuda.device_count()):
        numbers = torch.arange(4096, device=f"cuda:{index}", dtype=torch.float64)
        assert (numbers * 2).sum().item() == 4096 * 4095, f"cuda:{index} computes wrong numbers"
    print(torch.version.cuda, torch.cuda.device_count())


def cpu_adam():
    """DeepSpeed's CPUAdam, built where it is not yet, steps twice as torch's Adam does."""
    import torch

    began = time.time()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    results = []
    for optimizer_class in (DeepSpeedCPUAdam, torch.optim.Adam):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
        parameter.grad = torch.linspace(3, -2, 1000)
        optimizer = optimizer_class([parameter], lr=0.1)
        optimizer.step()
        optimizer.step()
        results.append(parameter.detach())
    worst = (results[0] - results[1]).abs().max().item()
    assert worst < 1e-5, f"CPUAdam differs from Adam by {worst}"
    print(f"CPUAdam built or found in {time.time() - began:.0f} s, equal to torch's Adam")


def torch_compile():
    """A function compiled for the CPU (torch.compile writes C++) gives what it gives uncompiled."""
    import torch

    def function(x):
        return (x.sin() + x * 2).relu()

    began = time.time()
    numbers = torch.linspace(-2, 2, 1000)
    worst = (torch.compile(function)(numbers) - function(numbers)).abs().max().item()
    assert worst < 1e-5, f"the compiled function differs by {worst}"
    print(
        f"a function compiled or found in {time.time() - began:.0f} s, equal to itself uncompiled"
    )


def all_reduce(rank, backend, first, second, folder):
    """One of two processes that add their numbers up; "right" where every sum is."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int((first, second)[int(rank)]))
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/meet",
        rank=int(rank),
        world_size=2,
        timeout=timedelta(seconds=40),
    )
    for size in (1, 1000, 4_000_000):
        numbers = torch.arange(size, dtype=torch.float32, device=device) % 1000
        expected = numbers * 3
        numbers *= int(rank) + 1
        dist.all_reduce(numbers)
        wrong = (numbers != expected).sum().item()
        if wrong:
            leave(f"{wrong} of {size} numbers are wrong", 3)
    dist.barrier()
    leave("right", 0)


def leave(last_line, exit_code):
    """End at once: a process group whose other side is gone would keep Python from ending."""
    print(last_line, flush=True)
    os._exit(exit_code)


def pinned():
    """1 GiB of page-locked memory, to the card and back."""
    import torch

    there = torch.arange(2**28, dtype=torch.int32).pin_memory()
    back = there.to("cuda", non_blocking=True).cpu()
    assert torch.equal(there, back), "the copy differs"
    print("1 GiB page-locked, copied to the card and back")


def load():
    """Matrix products on every card for four seconds; "ready" when they begin."""
    import torch

    cards = range(torch.cuda.device_count())
    matrices = [torch.randn(8192, 8192, device=f"cuda:{i}", dtype=torch.bfloat16) for i in cards]
    print("ready", flush=True)
    end = time.time() + 4
    while time.time() < end:
        for matrix in matrices:
            matrix @ matrix
        for index in cards:
            torch.cuda.synchronize(index)


def ask(address):
    """What a program that heeds http_proxy gets from `address`."""
    import urllib.request

    with urllib.request.urlopen(address, timeout=5) as answer:
        print(answer.read().decode())


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
