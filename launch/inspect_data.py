"""Show what training would see: the data report of the training set and of every evaluation set, and a few pairs token
by token. Loads the tokenizer, never the model.

    python launch/inspect_data.py --config launch/recipes/NAME.yaml [--section.key value ...] [--examples N] [--health]

Takes the options of training; --examples N (default 3) is the number of pairs shown token by token for each set.
--health shows instead what no single row can show: repeats, pairs in both orders, prompts that training and test sets
share, length bias, and the share of pairs that each max_length would truncate.
"""

import sys
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field
from rich.console import Console
from rich.rule import Rule

from hafrm_ds.config import TrainConfig
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.health import render_health
from hafrm_ds.data.preparation import PreparedGroups, choose_examples, prepare_groups
from hafrm_ds.data.presets import Role
from hafrm_ds.data.report import render_tokens
from hafrm_ds.data.sources import Source
from hafrm_ds.data.tables import as_text
from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.errors import ModelError, UserError, run_alone
from hafrm_ds.model.loading import load_model_config, load_tokenizer
from hafrm_ds.model.sizes import ModelSizes


class InspectOptions(TrainConfig):
    """Which data is shown, and how."""

    examples: Annotated[int, Field(ge=0)] = 3
    """Pairs of each set that are shown token by token."""
    health: bool = False
    """Show instead what no single row can show."""


def prepare(config: TrainConfig, formatter: ChatFormatter) -> Iterator[tuple[str, PreparedGroups]]:
    """(title, groups) of every set, the training set first."""
    sets: dict[str, tuple[Role, list[Source]]] = {"train": ("train", config.data.train)}
    sets |= {f"eval: {name}": ("eval", sources) for name, sources in config.data.eval.items()}
    for title, (role, sources) in sets.items():
        yield (
            title,
            prepare_groups(sources, formatter=formatter, options=config.data.preparation, role=role, seed=config.seed),
        )


def inspect(config: InspectOptions, console: Console) -> None:
    formatter = config.data.formatter(load_tokenizer(config.model))
    if config.health:
        # However much of it is unusable: that is when one looks.
        config = config.model_copy(update={"data": config.data.model_copy(update={"max_dropped_share": 1.0})})
        console.print(render_health(dict(prepare(config, formatter))))
        return
    for title, prepared in prepare(config, formatter):
        console.print(Rule(as_text(title)))
        console.print(prepared.report.render())
        for warning in what_does_not_fit(config, title, prepared, formatter):
            console.print(as_text(f"WARNING {warning}"), style="yellow", soft_wrap=True)
        for index in choose_examples(len(prepared), config.examples, config.seed):
            console.print(render_tokens(prepared[index], formatter.tokenizer))


def what_does_not_fit(
    config: TrainConfig, title: str, groups: PreparedGroups, formatter: ChatFormatter
) -> list[UserError]:
    """What training would refuse because the model has no room for it; nothing where only a tokenizer is at hand."""
    try:
        sizes = ModelSizes.of(config.model.name_or_path, load_model_config(config.model))
    except ModelError:
        return []
    return list(sizes.faults({title: groups}, formatter.tokenizer))


def main() -> None:
    inspect(load_config(sys.argv[1:], InspectOptions, about=__doc__), Console())


if __name__ == "__main__":
    run_alone(main)
