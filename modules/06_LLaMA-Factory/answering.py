"""How a model answers many prompts: greedily, a batch at a time."""


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
