"""What a layer does after its attention: one gated MLP, or a mixture of experts (MoE).

An expert is an MLP like any other, only narrower, and a router chooses some of them for every
token: 8 of 128 in Qwen3-30B-A3B, so that a token costs 3 of the 30 billion weights. All of them
must be in memory, and the tokens of a large batch together read nearly all in every step.
"""

import torch
import torch.nn.functional as F


class MLP:
    """SwiGLU (arXiv 2002.05202). `take(name)` gives a tensor of this layer's weights."""

    def __init__(self, take, name: str):
        gate = take(f"{name}.gate_proj.weight")  # [intermediate, hidden]
        up = take(f"{name}.up_proj.weight")
        self.gate_up = torch.cat((gate, up))
        self.down = take(f"{name}.down_proj.weight")  # [hidden, intermediate]

    def __call__(self, x):
        """[T, hidden] -> [T, hidden]; with tensor parallelism, this process's part of the sum."""
        gate, up = F.linear(x, self.gate_up).chunk(2, dim=-1)  # each [T, intermediate]
        return F.linear(F.silu(gate) * up, self.down)


class Experts:
    """Qwen3-MoE's layer (arXiv 2505.09388): every token through the experts that suit it best.

    One expert after another, each with its tokens: the host must know who has any, so the device is
    waited for in every layer, and no CUDA graph can record it. vLLM sorts the tokens by expert on
    the device and computes all experts in one kernel (fused_moe), which a graph can record; over
    several GPUs it can give each some of the experts whole (expert parallelism).
    """

    def __init__(self, take, router, config):
        self.config = config
        self.router = router  # [experts, hidden]
        self.experts = [MLP(take, f"mlp.experts.{i}") for i in range(len(router))]

    def __call__(self, x):
        """As an MLP. Routing is in float32 for bfloat16, too: close probabilities stay apart."""
        probabilities = F.linear(x, self.router).softmax(-1, dtype=torch.float32)  # [T, experts]
        shares, chosen = probabilities.topk(self.config["num_experts_per_tok"])  # each [T, top-k]
        if self.config.get("norm_topk_prob"):
            shares /= shares.sum(-1, keepdim=True)
        shares = shares.to(x.dtype)
        out = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            tokens, ranks = torch.where(chosen == number)  # each [tokens of this expert]
            expert = self.experts[number]
            out[tokens] += expert(x[tokens]) * shares[tokens, ranks, None]
        return out
