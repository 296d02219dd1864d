"""Compute the reference log-probs of a config once, before training.

    deepspeed launch/precompute_reference.py --config launch/recipes/NAME.yaml [--reference.store DIR]

launch/train.py with the same config then finds every value. Only what the store lacks is computed, so the pass may be
killed and started again, and a data set that grew costs only what was added. Any number of GPUs and any ZeRO stage will
do: the values do not depend on them.
"""

from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.processes.ranks import Processes, run_entry


def main(arguments: list[str], processes: Processes) -> None:
    config = load_config(arguments, about=__doc__)
    from hafrm_ds.training.run import precompute_reference

    precompute_reference(config, processes)


if __name__ == "__main__":
    run_entry(main)
