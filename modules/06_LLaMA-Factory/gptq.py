"""GPTQ from scratch: 4 bits a weight, chosen by what the layer answers. Source: arXiv 2210.17323.

A layer computes X W^T. What counts is not how far each rounded weight is from its own, but how far
the layer's answers to our rows move, |X W^T - X Q^T|^2. H = 2 X^T X says how much an error in one
column costs, and which other columns can make it good.
"""


def scales_of(weight, group_size: int):
    """[out, groups]: of a symmetric grid of 16 steps, -8 to 7, a group of neighbours each."""
    groups = weight.unflatten(1, (-1, group_size))  # [out, groups, group_size]
    return groups.abs().amax(dim=2) * 2 / 15


def nearest(weight, scale):
    """The step of the grid that is nearest, as the number that it stands for."""
    return (weight / scale).round().clamp(-8, 7) * scale


def round_to_nearest(weight, group_size: int):
    """[out, in]: each weight to its own nearest step."""
    scales = scales_of(weight, group_size).repeat_interleave(group_size, dim=1)
    return nearest(weight, scales)


def gptq(weight, inputs, group_size: int, damping: float = 0.01):
    """[out, in]: the weights rounded so that the answers to `inputs` [tokens, in] move little.

    `damping` is added to H's diagonal, as a share of its mean: columns that no row used have none.
    """
    import torch

    hessian = 2 * inputs.T @ inputs  # [in, in]
    order = hessian.diagonal().argsort(descending=True)  # what weighs most is rounded first
    hessian = hessian[order][:, order]
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(order))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    # Row i: how the columns after i must move for an error of 1 / inverse[i, i] in column i.
    inverse = torch.linalg.cholesky(inverse, upper=True)

    scales = scales_of(weight, group_size)
    rest = weight[:, order].clone()  # the columns not yet rounded change as we go
    rounded = torch.empty_like(rest)
    for i, column in enumerate(order.tolist()):
        rounded[:, i] = nearest(rest[:, i], scales[:, column // group_size])
        error = (rest[:, i] - rounded[:, i]) / inverse[i, i]
        rest[:, i:] -= error[:, None] * inverse[i, i:]
    return rounded[:, order.argsort()]
