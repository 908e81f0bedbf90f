"""From logits to the next tokens."""

import torch


def noise(seq, like: torch.Tensor) -> torch.Tensor:
    """Exponential noise for one draw. With a seed it depends on the request alone, not on who shares the batch or the engine."""
    seeded = None if seq.params.seed is None else torch.Generator(like.device).manual_seed(seq.params.seed * 1_000_003 + len(seq))
    return torch.empty_like(like).exponential_(generator=seeded)


def sample(logits: torch.Tensor, seqs: list) -> list[int]:
    """The next token of each sequence from its row of `logits` [S, vocabulary]: the likeliest, or drawn after temperature and top-p."""
    tokens = logits.max(dim=-1)[1]  # on CPUs twice as fast as argmax
    if drawing := [i for i, seq in enumerate(seqs) if seq.params.temperature > 0]:
        options = [(seqs[i].params.temperature, seqs[i].params.top_p) for i in drawing]
        temperature, top_p = torch.tensor(options, device=logits.device).split(1, dim=1)
        # Nucleus (arXiv 1904.09751): drop a token when the likelier ones already hold top_p of the probability.
        ordered, order = (logits[drawing].float() / temperature).softmax(-1).sort(dim=-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered > top_p] = 0
        picks = ordered / torch.stack([noise(seqs[i], ordered[0]) for i in drawing])  # its largest is a draw from `ordered` (Gumbel's trick)
        tokens[drawing] = order.gather(1, picks.argmax(-1, keepdim=True))[:, 0]
    return tokens.tolist()
