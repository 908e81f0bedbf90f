"""How a model answers, and how probable it finds an answer."""


def greedy_answers(model, tokenizer, prompts: list[str], batch_size: int, most: int):
    """([the answer of at most `most` tokens to each prompt], [its tokens]), a batch at a time."""
    answers, tokens = [], []
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer(
            prompts[start : start + batch_size],
            add_special_tokens=False,  # the template has put them in
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        output = model.generate(  # [batch, prompt + answer], prompts padded on the left
            **inputs,
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            tokens.append([token for token in row if token not in ends])
            answers.append(tokenizer.decode(row, skip_special_tokens=True))
    return answers, tokens


def loss_of(model, tokenizer, prompt: str, target: str) -> tuple[float, int]:
    """(summed cross entropy in nats, tokens) of `target` after `prompt`, each token given those
    before it as they should be (teacher forcing)."""
    import torch

    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    wanted = tokenizer(target, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([before + wanted], device=model.device)
    first = max(len(before), 1)  # a text's first token is foretold by nothing
    logits = model(input_ids=ids).logits[0, first - 1 : -1].float()  # [tokens, vocabulary]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum")
    return loss.item(), len(logits)


def most_tokens(tokenizer, questions) -> int:
    """Tokens that an answer may have: one longer than any wanted one is wrong anyway."""
    targets = [question.target for question in questions]
    return max(len(ids) for ids in tokenizer(targets)["input_ids"]) + 4
