"""Train a policy by TRL's GRPO or RLOO, with a reward of ours in a process beside each rank.

    deepspeed launch/policy.py --policy MODEL --reward RUN/final --prompts FILE --output_dir DIR [--max_steps 500]
    deepspeed launch/policy.py ... --reward helpful.yaml --method rloo --trl '{top_p: 0.95}'

Needs TRL: pip install -e '.[rl]'. The algorithm and its options are TRL's; DeepSpeed's JSON is one of ours. DIR
then holds config.yaml, metrics.jsonl and final/. A run that was stopped resumes from TRL's last checkpoint.
"""

from hafrm_ds.errors import in_own_names
from hafrm_ds.options import read
from hafrm_ds.processes.ownership import sole_owner
from hafrm_ds.processes.ranks import Processes, run_entry
from hafrm_ds.training.policy import PolicyOptions, train_policy


def main(arguments: list[str], processes: Processes) -> None:
    options = read(PolicyOptions, arguments, about=__doc__)
    processes.words = in_own_names
    with sole_owner(options.output_dir, processes):
        train_policy(options, processes)


if __name__ == "__main__":
    run_entry(main)
