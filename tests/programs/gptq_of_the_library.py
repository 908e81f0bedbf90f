"""argv: a file of tensors {weight, inputs}, and one to write {rounded, scales} to: llm-compressor's
GPTQ in groups of 32."""

import sys

import safetensors.torch
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle import initialize_module_for_quantization
from llmcompressor.modifiers.gptq import gptq_quantize
from llmcompressor.modifiers.quantization.calibration import initialize_observer

given = safetensors.torch.load_file(sys.argv[1])
weight = given["weight"]
layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
layer.weight.data = weight
# What GPTQModifier sets where a recipe says nothing else
args = QuantizationArgs(
    num_bits=4,
    strategy="group",
    group_size=32,
    actorder="static",
    observer="memoryless_minmax",
)
scheme = QuantizationScheme(targets=["Linear"], weights=args)
initialize_module_for_quantization(layer, scheme)
initialize_observer(layer, "weight")
with torch.no_grad():
    layer.weight_observer(layer.weight)
    hessian = gptq_quantize.make_empty_hessian(layer)
    count = torch.zeros(1)
    hessian, _ = gptq_quantize.accumulate_hessian(given["inputs"], layer, hessian, count)
    _, quantised = gptq_quantize.quantize_weight(layer, args, hessian)
safetensors.torch.save_file(
    {"rounded": quantised["weight"], "scales": quantised["weight_scale"]}, sys.argv[2]
)
