"""From logits to the next tokens."""

import torch


def sample(logits: torch.Tensor, seqs: list) -> list[int]:
    """The next token of each sequence from its row of `logits` [S, vocabulary]: the likeliest, or drawn after temperature and top-p."""
    tokens = logits.max(dim=-1)[1]  # on CPUs twice as fast as argmax
    if drawing := [i for i, seq in enumerate(seqs) if seq.params.temperature > 0]:
        temperature, top_p = torch.tensor([(seqs[i].params.temperature, seqs[i].params.top_p) for i in drawing], device=logits.device).split(1, dim=1)
        # Nucleus (arXiv 1904.09751): drop a token when the likelier ones already hold top_p of the probability.
        ordered, order = (logits[drawing].float() / temperature).softmax(-1).sort(dim=-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered > top_p] = 0
        noise = torch.empty_like(ordered).exponential_()
        for row, seq in zip(noise, (seqs[i] for i in drawing), strict=True):
            if seq.params.seed is not None:  # then a draw depends on the request alone, not on who shares the batch or the engine
                row.exponential_(generator=torch.Generator(row.device).manual_seed(seq.params.seed * 1_000_003 + len(seq)))
        tokens[drawing] = order.gather(1, (ordered / noise).argmax(-1, keepdim=True))[:, 0]  # the largest is a draw from `ordered` (Gumbel's trick)
    return tokens.tolist()
