"""Train round after round on what the policy itself answers: sample, rank by a reward, pair best with worst, train both
heads on these pairs and on human ones.

    deepspeed launch/rounds.py --config launch/recipes/NAME.yaml --model.name_or_path RUN/final \\
        --rounds.prompts FILE --rounds.evaluation_prompts FILE [--rounds.num_rounds 2] [--rounds.gold REWARD]

Takes the options of training, of which data.train are the human pairs that are replayed, and --rounds.NAME for what is
its own. By default each round is ranked by the reward head of the model that it starts from, and the answers that it
has ranked train the policy alone. Results are written after every round. Rounds that were stopped or killed resume when
they are started again.
"""

from pathlib import Path

from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.processes.ownership import sole_owner
from hafrm_ds.processes.ranks import Processes, run_entry
from hafrm_ds.training.rounds.options import RoundsOptions


def main(arguments: list[str], processes: Processes) -> None:
    options = load_config(arguments, RoundsOptions, about=__doc__)
    from hafrm_ds.training.rounds.rounds import run_rounds

    with sole_owner(options.output_dir, processes):
        run_rounds(options, Path(__file__).with_name("train.py"), processes)


if __name__ == "__main__":
    run_entry(main)
