"""Train a hybrid reward model.

    deepspeed launch/train.py --config launch/recipes/NAME.yaml [--section.key value ...]

`--help` lists every option, `--print_config` shows what a run would use.
"""

from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.processes.ownership import sole_owner
from hafrm_ds.processes.ranks import Processes, run_entry


def main(arguments: list[str], processes: Processes) -> None:
    config = load_config(arguments, about=__doc__)
    from hafrm_ds.training.run import train

    with sole_owner(config.output_dir, processes):
        train(config, processes)


if __name__ == "__main__":
    run_entry(main)
