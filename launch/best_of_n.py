"""Rank candidate answers with reward models, and see what the answers that they pick are worth.

    python launch/best_of_n.py --model RUN/final --candidates FILE --output_dir DIR
    python launch/best_of_n.py --model RUN/final OTHER/final --candidates FILE --gold REWARD_MODEL --output_dir DIR
    python launch/best_of_n.py --model RUN/final --prompts FILE --policy MODEL [--num_candidates 8] --output_dir DIR
    deepspeed launch/best_of_n.py ...                                             a copy of the models on each GPU

A row of the candidates has `prompt` (a text or messages), `responses` (a list), and where known `id` and `gold` (a
number for each answer); a row of the prompts has `prompt`. DIR then holds candidates.jsonl, the scores, ranked.jsonl
(the candidates of each prompt, best first) and, by the gold scores, best_of_n.json. A prompt with an answer that cannot
be scored is left out, and the exit status is then 3. A job that was killed resumes when it is started again.
"""

import sys

from hafrm_ds.errors import in_own_names
from hafrm_ds.evaluation.best_of_n.options import RankingOptions, SamplingOptions
from hafrm_ds.evaluation.best_of_n.ranking import rank
from hafrm_ds.options import read
from hafrm_ds.processes.ownership import sole_owner
from hafrm_ds.processes.ranks import Processes, run_entry

PROMPTS_NOT_SCORED = 3


def main(arguments: list[str], processes: Processes) -> None:
    short = {name: f"sampling.{name}" for name in SamplingOptions.model_fields}
    options = read(RankingOptions, arguments, about=__doc__, short=short)
    processes.words = in_own_names
    with sole_owner(options.output_dir, processes):
        num_bad = rank(options, processes)
    if num_bad:
        sys.exit(PROMPTS_NOT_SCORED)


if __name__ == "__main__":
    run_entry(main)
