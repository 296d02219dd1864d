"""Score a file of conversations with a trained model.

    python launch/score.py --model RUN/final --input IN.jsonl --output OUT.jsonl
    deepspeed launch/score.py --model RUN/final --input IN.jsonl --output OUT.jsonl     a copy of the model on each GPU
    deepspeed launch/score.py ... --deepspeed ds_configs/zero3.json                     one model, sharded over the GPUs

A row has `messages`, or `prompt` with `response`, or `prompt` with a list of `responses`. The same rows come out in the
same order, with `score` (or `scores`): the reward, or of a model that was trained by DPO alone the implicit reward, for
which the weights that it started from are loaded beside it. A row that cannot be scored has the score null and the
reason in `score_error`; it is reported by its line, and the exit status is then 3. A job that was killed goes on when
it is started again.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from hafrm_ds.processes.ranks import Processes, run_entry

ROWS_NOT_SCORED = 3


def read_command_line(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        help="the final/ folder of a training, or another reward model: AutoModelForSequenceClassification, one label",
    )
    parser.add_argument("--input", type=Path, required=True, help="JSON lines")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; must not exist")
    parser.add_argument(
        "--max_tokens_per_micro_batch", type=int, default=8192, help="token budget of one forward pass (%(default)s)"
    )
    parser.add_argument(
        "--reference",
        help="of a model without a reward head, what the implicit reward is measured against: a folder, a hub id, or "
        "base: what its training started from (the default)",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: that of the saved weights")
    parser.add_argument("--chat_template", help="name or file of a template, for a tokenizer without one")
    parser.add_argument("--deepspeed", type=Path, help="a DeepSpeed JSON: shard the model over the processes")
    parser.add_argument("--trust_remote_code", action="store_true", help="run modelling code that comes with the model")
    parser.add_argument("--trust_pickle", action="store_true", help="read weights that are not in safetensors")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser.parse_args(arguments)


def main(arguments: list[str], processes: Processes) -> None:
    options = read_command_line(arguments)
    from hafrm_ds.scoring.files import ScoringOptions, score_file

    asked = {field.name: getattr(options, field.name) for field in fields(ScoringOptions)}
    if score_file(ScoringOptions(**asked), processes):
        sys.exit(ROWS_NOT_SCORED)


if __name__ == "__main__":
    run_entry(main)
