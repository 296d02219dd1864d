"""Compare rewards on shared preference pairs: how often they disagree, and which aspects are worth adding to the first.

    python launch/agreement.py --rewards RUN/final aspects.py:brevity --data SOURCE --output_dir DIR
    python launch/agreement.py --rewards '{helpful: A/final, harmless: B/final}' --data SOURCE --output_dir DIR
    deepspeed launch/agreement.py ...                                        a copy of the models on each GPU

A reward is a model, a function FILE.py:NAME or a composition FILE.yaml. The first one is the holistic reward, and the
others are aspects. DIR then holds the scores of every pair, agreement.json, report.html and composition.yaml: a
hierarchy of these rewards with the means and deviations that were fitted, which --model takes elsewhere. A pair that a
reward cannot score is left out, and the exit status is then 3. A job that was killed resumes when it is started again.
"""

import sys

from hafrm_ds.errors import in_own_names
from hafrm_ds.evaluation.agreement_job import AgreementOptions, compare_rewards
from hafrm_ds.options import read
from hafrm_ds.processes.ownership import sole_owner
from hafrm_ds.processes.ranks import Processes, run_entry

PAIRS_NOT_SCORED = 3


def main(arguments: list[str], processes: Processes) -> None:
    options = read(AgreementOptions, arguments, about=__doc__)
    processes.words = in_own_names
    with sole_owner(options.output_dir, processes):
        num_bad = compare_rewards(options, processes)
    if num_bad:
        sys.exit(PAIRS_NOT_SCORED)


if __name__ == "__main__":
    run_entry(main)
