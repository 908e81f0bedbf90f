"""What fits and how fast, by arithmetic on a config.json: no torch, no GPU, no network.

    config.py    the sizes in a config.json
    weights.py   how many weights these make, and their bytes
    serving.py   what vLLM needs of each card: KV cache, largest batch, CUDA graphs
    training.py  what fine-tuning needs: states, activations, the moments of a step, the host
    images.py    what a pipeline that edits pictures needs of cards and host, by recipe
    speed.py     bounds from bandwidth, FLOP/s and communication
    constants.py units, bytes of a number, what a card and a process cost

A formula is a function; its docstring names the source and works the formula out for one model,
Qwen2.5-7B-Instruct (`config.QWEN_7B`; in images.py Qwen-Image-Edit). tests/test_memory.py runs
these examples. modules/01_single_gpu_smoke/planner.md walks through the files in this order, and
holds the predictions against measurements.
"""
