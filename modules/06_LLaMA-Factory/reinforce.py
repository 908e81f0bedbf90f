"""What 11_mini_grpo.py and 12_grpo.py share: flags, requests, and where they begin."""

from pathlib import Path

import factory
import rewards

from lab import data, fail, jobs, models, shown, training

BEGIN = factory.FOLDER / "half-merged"
LEARNT = 128  # rows at the start of the data set that the half-trained model knows
MOST_TOKENS = 64  # of an answer: a right one has about 45


def add_flags(parser, values) -> None:
    """What is asked, what is rewarded, how it is learnt; `values`: the profile's finetune.grpo."""
    models.add_model_flag(parser, shown(BEGIN))
    parser.add_argument(
        "--rewards",
        nargs="+",
        default=["exact", "field"],
        choices=list(rewards.RULES),
        help="the rules of rewards.py that count (default: exact field)",
    )
    # Rollouts
    training.add_flag(parser, "--data", str, values.data, "name of a data set, or a .json file")
    training.add_flag(parser, "--steps", int, values.steps, "rollouts")
    training.add_flag(parser, "--prompts", int, values.prompts, "requests of a rollout")
    training.add_flag(parser, "--group", int, values.group, "answers to each of them")
    # The loss
    training.add_flag(parser, "--minibatch", int, values.minibatch, "answers of an optimizer step")
    training.add_flag(parser, "--beta", float, 0.04, "what a nat away from the start costs")
    training.add_flag(parser, "--epsilon", float, 0.2, "how far from 1 a ratio still gains")
    training.add_flag(parser, "--learning-rate", float, values.learning_rate, "of AdamW")
    training.add_flag(parser, "--rank", int, 16, "of the LoRA adapter")


def checked(args) -> list[dict]:
    """The requests for these flags. Exit code 2 with one sentence where something is wrong."""
    jobs.refuse_taken_cards()
    if min(args.steps, args.prompts, args.minibatch, args.rank) < 1:
        fail("--steps, --prompts, --minibatch and --rank must be at least 1")
    if args.group < 2 or args.beta < 0 or args.epsilon <= 0:
        fail("--group must be at least 2, --beta at least 0, --epsilon more than 0")
    if args.prompts * args.group % args.minibatch:
        fail("--prompts times --group, the answers of a rollout, must divide by --minibatch")
    rows = data.rows(args.data)[LEARNT:]
    if args.steps * args.prompts > len(rows):
        fail(f"--steps times --prompts must be at most {len(rows)}, the requests there are")
    if args.model == shown(BEGIN) and not BEGIN.is_dir():
        fail(f"there is no {args.model}, where this begins: run 'make lf-half' first")
    return rows


def wanted_of(rows: list[dict]) -> list[str]:
    """The right answer to each row's request: for the marks only, the model never sees it."""
    return [row["messages"][-1]["content"] for row in rows]


def note_training(adapter: Path, model: Path) -> None:
    """The adapter's config.yaml, by which 02_score.py and 03_merge.py go, as the model's own."""
    from omegaconf import OmegaConf

    own = model / "config.yaml"
    settings = OmegaConf.load(own) if own.is_file() else OmegaConf.create()
    settings.model_name_or_path = shown(model)
    (adapter / "config.yaml").write_text(OmegaConf.to_yaml(settings), encoding="utf-8")
