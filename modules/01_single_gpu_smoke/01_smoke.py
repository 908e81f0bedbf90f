"""Smoke test: is this machine able to do what the other stages ask of it?

Prints the versions and devices, multiplies matrices on every device and compares the result with
float64, measures the memory bandwidth, and lets a language model write its first tokens. Everything
after this stage rests on these four things.

    python modules/01_single_gpu_smoke/01_smoke.py                     # on the detected profile
    python modules/01_single_gpu_smoke/01_smoke.py --matmul-size 4096  # more TFLOP/s, to a point

Look at: `error` of each product (how far from float64), GB/s (it bounds how fast a model can
decode), the model's answer. Exit code 1 when a product is wrong or the model does not know the
capital of France.
"""

import argparse
import time

from lab import fail, jobs, machine, models, results
from lab.profile import load_profile

# Largest accepted ||C - C64|| / ||C64|| of a product of random matrices: rounding of the inputs'
# format, with room to spare.
TOLERANCE = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 1e-2}
QUESTION = "What is the capital of France? Answer in one sentence."


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    # What is multiplied and copied
    parser.add_argument(
        "--matmul-size",
        type=int,
        default=profile.smoke.matmul_size,
        metavar="N",
        help="multiply N x N matrices (default: %(default)s)",
    )
    parser.add_argument(
        "--copy-mib",
        type=int,
        default=profile.smoke.copy_mib,
        metavar="M",
        help="MiB per buffer of the copy (default: %(default)s)",
    )
    # The model that writes
    models.add_model_flag(parser, profile.smoke.model)
    parser.add_argument(
        "--new-tokens",
        type=int,
        default=32,
        metavar="T",
        help="most tokens the model may write (default: %(default)s)",
    )
    args = parser.parse_args()
    if min(args.matmul_size, args.copy_mib, args.new_tokens) < 1:
        fail("--matmul-size, --copy-mib and --new-tokens must be at least 1")
    jobs.refuse_taken_cards()
    folder = models.model_folder(args.model)

    # -----------------------------------------------------------------------------
    # 1. Versions and devices

    import torch
    from torch.utils.benchmark import Timer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    facts = machine.describe()
    processor = f"{facts['cpu']}, {facts['cores']} cores, {facts['ram_gib']} GiB"
    print(f"profile {profile.name}   machine {facts['name']}   {processor}")
    print("  ".join(f"{package} {version}" for package, version in machine.versions().items()))
    devices = ["cpu"]
    dtypes = ["float32", "bfloat16"]
    if profile.device == "cuda":
        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        dtypes = ["float32", "float16", "bfloat16"]
    for device, gpu in zip(devices, facts["gpus"], strict=False):
        software = f"driver {gpu['driver']}, CUDA {torch.version.cuda}"
        print(f"{device}: {gpu['name']}, {gpu['memory_gib']} GiB, {software}")
    metrics = {"device_count": len(devices)}

    def seconds(statement: str, **names) -> float:
        """Median time of one execution of `statement`, the device synchronised."""
        timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=0.5).median

    # -----------------------------------------------------------------------------
    # 2. Matrix products, checked against float64

    n = args.matmul_size
    wrong = []
    print(f"\nmatrix product {n} x {n}       TFLOP/s      error (against float64)")
    for device in devices:
        for dtype in dtypes:
            kind = {"device": device, "dtype": getattr(torch, dtype)}
            a = torch.randn(n, n, **kind)
            b = torch.randn(n, n, **kind)
            c = torch.full((n, n), float("nan"), **kind)  # NaN stays where nothing is written
            torch.mm(a, b, out=c)

            rows = slice(0, 64)  # float64 on a few rows is proof enough and quick on any device
            reference = a[rows].double().cpu() @ b.double().cpu()
            error = ((c[rows].double().cpu() - reference).norm() / reference.norm()).item()
            ok = bool(torch.isfinite(c).all()) and error < TOLERANCE[dtype]
            if not ok:
                wrong.append(f"{dtype} product on {device}")

            took = seconds("torch.mm(a, b, out=c)", torch=torch, a=a, b=b, c=c)
            tflops = 2 * n**3 / took / 1e12  # a multiplication and an addition for each term
            verdict = "ok" if ok else "WRONG"
            print(f"  {device:8} {dtype:10} {tflops:12.3f} {error:12.1e}   {verdict}")
            key = f"matmul_{device.replace(':', '')}_{dtype}"
            metrics[f"{key}_tflop_per_s"] = round(tflops, 4)
            metrics[f"{key}_error_ratio"] = error
            del a, b, c

    # -----------------------------------------------------------------------------
    # 3. Memory bandwidth: a copy reads every byte once and writes it once

    print(f"\ncopy of {args.copy_mib} MiB             GB/s (read + written)")
    copy_rates = []
    for device in devices:
        source = torch.ones(args.copy_mib * 2**20, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        took = seconds("target.copy_(source)", target=target, source=source)
        gb_per_s = 2 * source.numel() / took / 1e9
        copy_rates.append(gb_per_s)
        print(f"  {device:8} {gb_per_s:23.1f}")
        metrics[f"copy_{device.replace(':', '')}_gb_per_s"] = round(gb_per_s, 2)
        del source, target

    # -----------------------------------------------------------------------------
    # 4. First tokens

    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, profile.dtype))
    model.to(devices[0]).eval()
    load_s = time.perf_counter() - began
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(devices[0])

    # The first call also loads and chooses kernels: it is not timed.
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    clock = Clock()
    output = model.generate(
        **inputs, max_new_tokens=args.new_tokens, do_sample=False, streamer=clock
    )
    prompt_length = inputs["input_ids"].shape[1]
    answer = tokenizer.decode(output[0, prompt_length:], skip_special_tokens=True)
    stamps = clock.stamps  # of the prompt, then of every new token
    first_ms = 1000 * (stamps[1] - stamps[0])
    rest_s = stamps[-1] - stamps[1]
    decode = (len(stamps) - 2) / rest_s if rest_s else 0.0

    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    bound = copy_rates[0] * 1e9 / weights
    loaded = f"loaded in {load_s:.1f} s, {weights / 1e9:.2f} GB of weights"
    print(f"\n{args.model} on {devices[0]}: {loaded}")
    print(f"  > {QUESTION}\n  < {answer.strip()}")
    print(f"  first token after {first_ms:.0f} ms, then {decode:.1f} tokens/s")
    allowed = f"the copy rate allows about {bound:.0f} tokens/s: {decode / bound:.0%} reached"
    print(f"  every token reads all weights once, so {allowed}")
    if "paris" not in answer.lower():
        wrong.append("the model's answer")

    metrics |= {
        "load_s": round(load_s, 2),
        "first_token_ms": round(first_ms, 1),
        "decode_tok_per_s": round(decode, 1),
        "decode_of_bandwidth_ratio": round(decode / bound, 3),
        "weights_gb": round(weights / 1e9, 3),
        "wrong_count": len(wrong),
    }
    print(f"\n{'all right' if not wrong else 'WRONG: ' + ', '.join(wrong)}")
    results.finish(__file__, metrics, vars(args))
    raise SystemExit(1 if wrong else 0)


class Clock:
    """A streamer for `generate`, which hands it the prompt and then every new token."""

    def __init__(self):
        self.stamps: list[float] = []

    def put(self, _tokens):
        self.stamps.append(time.perf_counter())

    def end(self):
        """Nothing is left to do."""


if __name__ == "__main__":
    main()
