"""Search by meaning: texts to vectors, then scores for a question; the server writes nothing.

    make vllm-serve ARGS="--runner pooling"          # any model: its last hidden state
    make vllm-embed
    make vllm-serve RECIPE=qwen3-embedding-0.6b      # on a GPU: one that was trained for it
    python modules/03_vllm/17_embed.py --query "Which animal sleeps?"

Look at: the order of the texts. By a model that was never trained for it, such as SmolLM2, all
cosines are high and close together; an embedding model pulls them apart, and a reranking model,
which reads question and text together, decides between the nearest.
"""

import argparse
import os

from lab import engine, fail, results
from lab.profile import load_profile

TEXTS = (
    "Paris is the capital of France.",
    "Bread is baked from flour and water.",
    "A cat sleeps on the sofa.",
    "The Eiffel Tower was finished in 1889.",
)
# Qwen3-Embedding's card: a question says what it is for, a text stands as it is.
TASK = "Given a web search query, retrieve relevant passages that answer the query"


def cosine(a: list[float], b: list[float]) -> float:
    """Cosine of the angle between two vectors of the same length: 1 is the same direction."""
    product = sum(x * y for x, y in zip(a, b, strict=True))
    length_a = sum(x * x for x in a) ** 0.5
    length_b = sum(x * x for x in b) ** 0.5
    return product / (length_a * length_b)


def show(what: str, scores: list[float]) -> None:
    """The texts with their scores, the best first."""
    print(what)
    for score, text in sorted(zip(scores, TEXTS, strict=True), reverse=True):
        print(f"  {score:7.4f}  {text}")


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engine.add_address_flag(parser, profile)
    parser.add_argument(
        "--query",
        default="What is the capital of France?",
        help="what is looked for (default: %(default)s)",
    )
    args = parser.parse_args()
    if not args.query.strip():
        fail("the query is empty: say something with --query")

    import openai

    key = os.environ.get("VLLM_API_KEY", "unused")
    client = openai.OpenAI(base_url=f"{args.address}/v1", api_key=key, max_retries=0)
    model = engine.served_model(client).id

    # -----------------------------------------------------------------------------
    # 1. Vectors: each text alone, so they can be computed once and kept

    try:
        question = f"Instruct: {TASK}\nQuery:{args.query}"
        reply = client.embeddings.create(model=model, input=[question, *TEXTS])
        asked, *stored = [item.embedding for item in reply.data]
        print(f"{model}: {len(asked)} numbers a text, {reply.usage.prompt_tokens} tokens in")
        show(f"cosines with: {args.query}", [cosine(asked, vector) for vector in stored])
    except openai.NotFoundError:  # a reranking model has none, a model that answers has no pooling
        print(f"{model}: this server makes no vectors")

    # -----------------------------------------------------------------------------
    # 2. Scores: question and text together, so each question reads every text anew

    body = {"model": model, "query": args.query, "documents": list(TEXTS)}
    try:
        ranking = client.post("/rerank", body=body, cast_to=object)
    except openai.NotFoundError:
        fail(f"{model} is served to answer: make vllm-serve ARGS='--runner pooling'")
    except openai.APIStatusError as e:
        fail(f"the server refused the request: {e.message}")
    scores = {item["index"]: item["relevance_score"] for item in ranking["results"]}
    show("reranked", [scores[place] for place in range(len(TEXTS))])
    results.note(results.name_of(__file__))


if __name__ == "__main__":
    main()
