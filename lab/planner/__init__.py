"""What fits and how fast, by arithmetic on a config.json: no torch, no GPU, no network.

    config.py        what a config.json says of a model; values.py reads each value
    tensors.py       every weight by name and shape: families.py, vision.py say how models differ
    counted.py       the weights of an architecture that families.py lacks, built by transformers
    quantization.py  how a checkpoint stores each weight
    weights.py       how many weights a model has, and their bytes
    cache.py         what each kind of layer keeps of a request, in vLLM's blocks
    serving.py       what vLLM needs of each card: weights, largest batch, KV cache, CUDA graphs
    states.py        what fine-tuning keeps for good: weights, gradients, optimizer states
    training.py      what comes and goes in a step; tower.py: of pictures
    host.py          what lies on the host or on NVMe
    images.py        what a pipeline that edits pictures needs of cards and host, by recipe
    speed.py         bounds from bandwidth, FLOP/s and communication
    constants.py     units, bytes of a number, what a card and a process cost

A formula is a function; its docstring names the source and works the formula out for one model,
Qwen2.5-7B-Instruct (`config.QWEN_7B`; in images.py Qwen-Image-Edit). tests/test_memory.py runs
these examples. modules/01_single_gpu_smoke/planner.md walks through the files in this order, and
holds the predictions against measurements.
"""
