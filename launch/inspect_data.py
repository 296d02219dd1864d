"""Show what training would see: the data report of the training set and of every evaluation set, and a few pairs token
by token. Loads the tokenizer, never the model.

    python launch/inspect_data.py --config launch/recipes/NAME.yaml [--section.key value ...] [--examples N] [--health]

Takes the options of training; --examples N (default 3) is the number of pairs shown token by token for each set.
--health shows instead what no single row can show: repeats, pairs in both orders, prompts that training and test sets
share, length bias, and the share of pairs that each max_length would cut.
"""

import argparse
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.rule import Rule

from hafrm_ds.config import TrainConfig
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.health import render_health
from hafrm_ds.data.preparation import PreparedPairs, choose_examples, prepare_pairs
from hafrm_ds.data.report import render_tokens
from hafrm_ds.data.tables import as_text
from hafrm_ds.errors import run_alone
from hafrm_ds.model.loading import load_tokenizer
from hafrm_ds.options import load_config


def read_command_line(arguments: list[str]) -> tuple[TrainConfig, argparse.Namespace]:
    """-> (configuration, options of this file)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--examples", type=int, default=3)
    parser.add_argument("--health", action="store_true")
    own, rest = parser.parse_known_args(arguments)
    return load_config(rest, about=__doc__, own=vars(own)), own


def prepare(config: TrainConfig, formatter: ChatFormatter) -> Iterator[tuple[str, PreparedPairs]]:
    """(title, pairs) of every set, the training set first."""
    sets = {"train": ("train", config.data.train)}
    sets |= {f"eval: {name}": ("eval", sources) for name, sources in config.data.eval.items()}
    for title, (role, sources) in sets.items():
        yield (
            title,
            prepare_pairs(sources, formatter=formatter, options=config.data.preparation, role=role, seed=config.seed),
        )


def inspect(config: TrainConfig, own: argparse.Namespace, console: Console) -> None:
    formatter = ChatFormatter.create(load_tokenizer(config.model), config.data.chat_template, config.data.template_date)
    if own.health:
        # However much of it is unusable: that is when one looks.
        config = config.model_copy(update={"data": config.data.model_copy(update={"max_dropped_share": 1.0})})
        console.print(render_health(dict(prepare(config, formatter))))
        return
    for title, prepared in prepare(config, formatter):
        console.print(Rule(as_text(title)))
        console.print(prepared.report.render())
        for index in choose_examples(len(prepared), own.examples, config.seed):
            console.print(render_tokens(prepared[index], formatter.tokenizer))


def main() -> None:
    config, own = read_command_line(sys.argv[1:])
    inspect(config, own, Console())


if __name__ == "__main__":
    run_alone(main)
