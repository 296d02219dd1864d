"""Score a file of conversations with a trained model.

    python launch/score.py --model RUN/final --input IN.jsonl --output OUT.jsonl
    deepspeed launch/score.py --model RUN/final --input IN.jsonl --output OUT.jsonl     a copy of the model on each GPU
    deepspeed launch/score.py ... --deepspeed ds_configs/zero3.json                     one model, sharded over the GPUs

A row has `messages`, or `prompt` with `response`, or `prompt` with a list of `responses`. The same rows come out in the
same order, with `score` (or `scores`): the reward, or of a model that was trained by DPO alone the implicit reward, for
which the weights that it started from are loaded beside it. --judge combined scores by both, as the fit in hafrm.json
weights them. These scores and implicit rewards compare answers to one prompt alone. A row that cannot be scored has the
score null and the reason in `score_error`; it is reported by its line, and the exit status is then 3. A job that was
killed resumes when it is started again.
"""

import sys

from hafrm_ds.errors import in_own_names
from hafrm_ds.options import read
from hafrm_ds.processes.ownership import sole_owner
from hafrm_ds.processes.ranks import Processes, run_entry
from hafrm_ds.scoring.files import ScoringOptions, score_file

ROWS_NOT_SCORED = 3


def main(arguments: list[str], processes: Processes) -> None:
    options = read(ScoringOptions, arguments, about=__doc__)
    processes.words = in_own_names
    with sole_owner(options.output, processes, "--output"):
        num_bad = score_file(options, processes)
    if num_bad:
        sys.exit(ROWS_NOT_SCORED)


if __name__ == "__main__":
    run_entry(main)
