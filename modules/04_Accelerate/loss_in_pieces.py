"""The loss of a language model without its logits: [tokens, vocabulary] never exists whole.

Of a piece of the tokens at a time: logits, loss, and at once the gradients, so that nothing has to
be kept for the backward pass or computed again in it (as in Liger Kernel's fused linear
cross-entropy, arXiv 2410.10989).
"""

import torch

NOT_COUNTED = -100  # a target that is none, as in PyTorch


def piece(hidden, weight, targets, count) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, its gradient by `hidden`, by `weight`) of some tokens; `count`: of all pieces.

    hidden [tokens, width], weight [vocabulary, width], targets [tokens].
    """
    logits = hidden @ weight.t()  # [tokens, vocabulary], the largest thing here
    logs = logits.float().log_softmax(-1)
    counted = targets != NOT_COUNTED
    target = targets.clamp(min=0).unsqueeze(1)  # [tokens, 1]
    share = counted / count  # what a token's loss weighs, [tokens]
    loss = -(logs.gather(1, target).squeeze(1) * share).sum()
    columns = torch.arange(weight.shape[0], device=weight.device)
    wrong = logs.exp() - (columns == target).float()
    of_logits = (wrong * share.unsqueeze(1)).to(hidden.dtype)
    return loss, of_logits @ weight, of_logits.t() @ hidden


class LossInPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, pieces, compute):
        count = (targets != NOT_COUNTED).sum()
        loss = torch.zeros((), device=hidden.device)
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=torch.float32)  # a sum, so in fp32
        parts = (hidden.chunk(pieces), targets.chunk(pieces), of_hidden.chunk(pieces))
        for some, their_targets, place in zip(*parts, strict=True):
            some_loss, by_hidden, by_weight = compute(some, weight, their_targets, count)
            loss += some_loss
            place.copy_(by_hidden)
            of_weight += by_weight
        ctx.save_for_backward(of_hidden, of_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, gradient):
        of_hidden, of_weight = ctx.saved_tensors
        scale = gradient.to(of_hidden.dtype)
        return of_hidden * scale, of_weight * scale, None, None, None


def loss_in_pieces(hidden, weight, ids, pieces: int, compute=piece) -> torch.Tensor:
    """The mean cross-entropy of the next tokens, as `model(input_ids=ids, labels=ids).loss`.

    hidden [batch, length, width], weight of the output layer [vocabulary, width], ids [batch,
    length]. `compute`: `piece`, or it compiled.
    """
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=NOT_COUNTED)
    return LossInPieces.apply(hidden.flatten(0, 1), weight, targets.flatten(), pieces, compute)
