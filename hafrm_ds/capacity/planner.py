"""From options to a plan on the screen, and to a recipe."""

import math
from functools import partial
from pathlib import Path

from rich.console import Console

from hafrm_ds.capacity.plan import Machines, Plan
from hafrm_ds.capacity.report import render
from hafrm_ds.capacity.shapes import model_of_shapes
from hafrm_ds.capacity.workload import Workload, uniform_lengths
from hafrm_ds.config import TrainConfig
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.lengths import GroupLengths
from hafrm_ds.data.preparation import prepare_groups
from hafrm_ds.errors import ConfigError, UserError
from hafrm_ds.model.hybrid import HybridModel
from hafrm_ds.model.loading import load_model_config, load_tokenizer
from hafrm_ds.model.sizes import ModelSizes


def plan_run(
    config: TrainConfig,
    machines: Machines,
    expected: tuple[int, int, int] | None,
    recipe: Path | None,
    console: Console,
) -> None:
    """Print the plan of a run, and write what it recommends.

    Args:
        expected: number of pairs, and mean tokens of prompt and of an answer, for data that is not there; None: the
            data of the run is read.
        recipe: file for the recommended configuration.

    Raises:
        UserError: the model or data cannot be read, or nothing fits that a recipe could be made of.
    """
    if config.batch.global_batch_size < machines.num_processes:
        raise ConfigError(
            [
                f"batch.global_batch_size is {config.batch.global_batch_size} pairs, fewer than the "
                f"{machines.num_processes} GPUs; every GPU needs a pair in each step"
            ]
        )
    if recipe is not None and expected is not None:
        raise ConfigError(["--write needs the data of the run (--data), as a recipe names it"])
    model = model_of_shapes(config)
    lengths, eval_lengths = uniform_sets(*expected) if expected is not None else lengths_of_sets(config)
    plan = Plan(config, model, workload_of(config, model, lengths, eval_lengths), machines)
    console.print(render(plan))
    if recipe is not None:
        if plan.recommended is None:
            raise UserError(f"nothing fits: {recipe} is not written")
        try:
            recipe.write_text(plan.recipe(plan.recommended).to_yaml())
        except OSError as error:
            raise UserError(f"--write {recipe} cannot be written: {error.strerror}") from error
        console.print(f"{recipe} is written")


def workload_of(config: TrainConfig, model: HybridModel, lengths: GroupLengths, eval_lengths: GroupLengths) -> Workload:
    """What a run computes, with layout and number of steps settled as in training."""
    layout, batch_size = config.batch.layout, config.batch.global_batch_size
    if layout == "auto":
        layout = "shared_prefix" if model.causal_lm._supports_attention_backend else "padded"
    steps = config.max_steps or math.ceil(config.epochs * len(lengths) / batch_size)
    return Workload(lengths, eval_lengths, steps, batch_size, config.seed, layout)


def lengths_of_sets(config: TrainConfig) -> tuple[GroupLengths, GroupLengths]:
    """Token lengths of the training groups, and of all evaluation groups, prepared as training prepares them.

    Raises:
        DataError, ModelError: as for training, of pairs that the model has no room for too.
    """
    formatter = ChatFormatter.create(
        load_tokenizer(config.model), config.data.chat_template, config.data.template_date, config.data.reasoning
    )
    prepare = partial(prepare_groups, formatter=formatter, options=config.data.preparation, seed=config.seed)
    train = prepare(config.data.train, role="train")
    sets = {f"eval {name}": prepare(sources, role="eval") for name, sources in config.data.eval.items()}
    sizes = ModelSizes.of(config.model.name_or_path, load_model_config(config.model))
    sizes.check({"train": train, **sets}, formatter.tokenizer)
    return train.lengths, GroupLengths.joined(groups.lengths for groups in sets.values())


def uniform_sets(num_pairs: int, prompt: int, answer: int) -> tuple[GroupLengths, GroupLengths]:
    return uniform_lengths(num_pairs, prompt, answer), uniform_lengths(0, prompt, answer)
