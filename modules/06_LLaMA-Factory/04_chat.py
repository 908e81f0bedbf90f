"""Talk to the tuned model: LLaMA-Factory's own chat on the command line, base model plus adapter.

    make lf-chat                               # `clear` forgets the conversation, `exit` ends it
    printf 'Put yi-34b on 2 cards ...\\nexit\\n' | make lf-chat

Look at: an answer in the trained format to a request in words of your own. Each further question
sees the whole conversation, which the training data (one question, one answer) does not have:
`clear` before each request.
"""

import argparse
import sys
from pathlib import Path

import factory

from lab import fail, jobs, results, shown
from lab.profile import load_profile

HERE = Path(__file__).resolve().parent


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    factory.add_adapter_flag(parser)
    args = parser.parse_args()
    jobs.refuse_taken_cards()

    # -----------------------------------------------------------------------------
    # 1. The settings that agree with training, and LLaMA-Factory's own command

    source = HERE / "configs" / "infer.yaml"
    done = factory.trained(args.adapter)
    settings = factory.settings_for(source, done, profile.finetune.dtype)
    comment = f"infer.yaml and {args.adapter}/config.yaml"
    config = factory.write(settings, "chat", comment)
    command = factory.prepare({"LLAMAFACTORY_VERBOSITY": "WARN"}, "chat", shown(config))

    # -----------------------------------------------------------------------------
    # 2. That command in this very process: it reads your keyboard, or what is piped in

    from llamafactory import cli

    sys.argv = command
    try:
        cli.main()
    except EOFError:  # the piped input ended without `exit`
        print()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError, RuntimeError) as e:
        fail(f"LLaMA-Factory stopped: {str(e).strip().splitlines()[0][:300]}")
    results.note(results.name_of(__file__))


if __name__ == "__main__":
    main()
