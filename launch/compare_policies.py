"""Hold policies that were trained on different rewards against one another: win rate under a gold reward, divergence
from their start, length.

    python launch/compare_policies.py --policies '{Baseline: A/final, HaF: B/final}' --start MODEL --prompts FILE \\
        --gold REWARD --output_dir DIR
    deepspeed launch/compare_policies.py --policies '{Baseline: [A0/final, A1/final], HaF: [B0/final, B1/final]}' ...

The check of HAF-RM's section 4.5: train a policy on either reward (launch/policy.py), from the same start and for the
same steps, and let a reward that neither was trained on judge one answer of each to every prompt. A tie counts half.
Intervals are by a bootstrap over prompts, and over seeds where there are several. A job that was killed resumes.
"""

from hafrm_ds.errors import in_own_names
from hafrm_ds.evaluation.policy_comparison import PolicyComparisonOptions, compare_policies
from hafrm_ds.options import read
from hafrm_ds.processes.ownership import sole_owner
from hafrm_ds.processes.ranks import Processes, run_entry


def main(arguments: list[str], processes: Processes) -> None:
    options = read(PolicyComparisonOptions, arguments, about=__doc__)
    processes.words = in_own_names
    with sole_owner(options.output_dir, processes):
        compare_policies(options, processes)


if __name__ == "__main__":
    run_entry(main)
