"""Rank candidate answers with reward models, and see what the answers that they pick are worth.

    python launch/best_of_n.py --model RUN/final --candidates FILE --output_dir DIR
    python launch/best_of_n.py --model RUN/final OTHER/final --candidates FILE --gold REWARD_MODEL --output_dir DIR
    python launch/best_of_n.py --model RUN/final --prompts FILE --policy MODEL [--num_candidates 8] --output_dir DIR
    deepspeed launch/best_of_n.py ...                                             a copy of the models on each GPU

A row of the candidates has `prompt` (a text or messages), `responses` (a list), and where known `id` and `gold` (a
number for each answer); a row of the prompts has `prompt`. DIR then holds candidates.jsonl, the scores, ranked.jsonl
(the candidates of each prompt, best first) and, by the gold scores, best_of_n.json. A prompt with an answer that cannot
be scored is left out, and the exit status is then 3. A job that was killed goes on when it is started again.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from hafrm_ds.errors import ConfigError
from hafrm_ds.processes.ranks import Processes, run_entry

PROMPTS_NOT_SCORED = 3


def read_command_line(arguments: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", required=True, help="one or more: final/ folders of trainings, or other reward models")
    add("--output_dir", type=Path, required=True, help="where the results go")
    add("--candidates", type=Path, help="a file with answers: .jsonl, .json or .parquet")
    add("--reference", help="of a model without a reward head, as DPO leaves it, what its implicit reward is measured "
        "against: a folder, a hub id, or base: what its training started from (the default)")  # fmt: skip
    add("--gold", help="another reward model, by whose scores the picks are judged (default: field gold of the rows)")
    add("--max_tokens_per_micro_batch", type=int, default=8192, help="token budget of one forward pass (%(default)s)")
    add("--dtype", choices=("bfloat16", "float32"), help="default: that of the saved weights")
    add("--trust_remote_code", action="store_true", help="run modelling code that comes with a model")
    add("--trust_pickle", action="store_true", help="read weights that are not in safetensors")
    add("--local_rank", help=argparse.SUPPRESS)  # given by the deepspeed launcher
    add = parser.add_argument_group("sampling, in place of --candidates").add_argument
    add("--prompts", type=Path, help="a file with prompts")
    add("--policy", help="who answers: a folder or hub id with a causal LM")
    add("--num_candidates", type=int, help="different answers to each prompt; at most twice as many are drawn (8)")
    add("--temperature", type=float, nargs=2, metavar=("LOW", "HIGH"), help="uniform between these, anew for each "
        "answer (0.5 1.2)")  # fmt: skip
    add("--top_p", type=float, help="of the probability, the share that is drawn from (0.85)")
    add("--max_new_tokens", type=int, help="an answer is cut there (512)")
    add("--seed", type=int, help="of the draws (0)")
    add("--sampler", choices=("auto", "transformers", "vllm"), help="auto: vLLM on a GPU where it is installed")
    add("--policy_chat_template", help="name or file of a template, for a policy without one")
    options = vars(parser.parse_args(arguments))
    del options["local_rank"]
    return options


def main(arguments: list[str], processes: Processes) -> None:
    options = read_command_line(arguments)
    from hafrm_ds.evaluation.best_of_n.ranking import RankingOptions, rank
    from hafrm_ds.evaluation.best_of_n.sampling import SamplingOptions

    asked = {field.name: options.pop(field.name) for field in fields(SamplingOptions)}
    given = {name: value for name, value in asked.items() if value is not None}
    if options["candidates"] is None:
        if missing := [f"--{name}" for name in ("prompts", "policy") if name not in given]:
            raise ConfigError(
                [f"give --candidates FILE, or --prompts FILE with --policy MODEL (missing: {', '.join(missing)})"]
            )
        options["sampling"] = SamplingOptions(**given)
    elif given:
        raise ConfigError([f"--candidates brings the answers, so nothing is sampled: leave out --{', --'.join(given)}"])
    if rank(RankingOptions(**options), processes):
        sys.exit(PROMPTS_NOT_SCORED)


if __name__ == "__main__":
    run_entry(main)
