"""A linear layer whose three matrix products are computed in fp8, from scratch.

e4m3 (4 bits of exponent, 3 of mantissa, up to 448) for weights and inputs, e5m2 (up to 57,344) for
gradients, which spread wider; one scale for a whole tensor, measured anew at every use ("dynamic,
per tensor"; arXiv 2209.05433, and nanochat's fp8.py). Weights, gradients and optimizer states stay
in the model's own type. Needs compute capability 8.9 (RTX 4090, H100); on a CPU it is emulated,
slowly. Rows, inputs and outputs of a layer must be multiples of 16.
"""

import torch

FORWARD = torch.float8_e4m3fn
BACKWARD = torch.float8_e5m2


def to_float8(values: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(`values` / scale in fp8, scale): the largest of them becomes the largest number of `kind`.

    The scale is fp32, without dimensions.
    """
    largest = torch.finfo(kind).max
    scale = values.abs().amax().float().clamp(min=1e-12) / largest
    # A cast does not saturate: what rounding lifts above the largest number would be NaN.
    scaled = (values.float() / scale).clamp(-largest, largest)
    return scaled.to(kind), scale


def product(a, b, a_scale, b_scale, dtype: torch.dtype, fast: bool) -> torch.Tensor:
    """[m, k] @ [k, n] of fp8 numbers -> [m, n] in `dtype`; `a` by rows in memory, `b` by columns.

    `fast`: the tensor cores add up with fewer bits, which a forward pass bears.
    """
    return torch._scaled_mm(
        a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast
    )


def by_columns(matrix: torch.Tensor) -> torch.Tensor:
    """The same numbers, those of a column side by side in memory."""
    return matrix.t().contiguous().t()


class Float8Product(torch.autograd.Function):
    """x [rows, in] @ weight [out, in] transposed -> [rows, out]."""

    @staticmethod
    def forward(ctx, x, weight):
        x8, x_scale = to_float8(x, FORWARD)
        weight8, weight_scale = to_float8(weight, FORWARD)
        ctx.save_for_backward(x8, x_scale, weight8, weight_scale)
        return product(x8, weight8.t(), x_scale, weight_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx, gradient):
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        dtype = gradient.dtype
        # [rows, out], used twice:
        gradient8, scale = to_float8(gradient.contiguous(), BACKWARD)
        of_x = product(gradient8, by_columns(weight8), scale, weight_scale, dtype, fast=False)
        turned = gradient8.t().contiguous()  # [out, rows]
        of_weight = product(turned, by_columns(x8), scale, x_scale, dtype, fast=False)
        return of_x, of_weight


class Float8Linear(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], in the type of x, which is that of the weight."""
        rows = Float8Product.apply(x.reshape(-1, self.in_features), self.weight)
        answer = rows.view(*x.shape[:-1], self.out_features)
        return answer if self.bias is None else answer + self.bias


def exchange(module: torch.nn.Module) -> int:
    """Let every linear layer below `module` multiply in fp8; how many there are."""
    layers = [layer for layer in module.modules() if type(layer) is torch.nn.Linear]
    for layer in layers:
        layer.__class__ = Float8Linear  # the weights stay where they are
    return len(layers)
