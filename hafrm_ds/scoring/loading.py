"""A model for a scoring job: a copy on each process, or one sharded over all of them."""

from pathlib import Path

from hafrm_ds.errors import ModelError
from hafrm_ds.model.opening import SavedScorer, load_scorer
from hafrm_ds.model.policy import SavedPolicy
from hafrm_ds.model.saved import SavedModel
from hafrm_ds.model.scorer import Scorer
from hafrm_ds.training.processes import Processes


def load_for_job(saved: SavedScorer, deepspeed: Path | None, max_tokens: int, processes: Processes) -> Scorer:
    """Load a model; all processes call this together.

    Args:
        deepspeed: a DeepSpeed JSON, if the model is sharded.

    Raises:
        ModelError: the model cannot be loaded, or not so.
    """
    if deepspeed is None:
        processes.use_device()
        return load_scorer(saved, processes.device, max_tokens)
    if not isinstance(saved, SavedModel | SavedPolicy) or "layout" not in saved.metadata:
        raise ModelError(
            f"{saved.folder}: --deepspeed shards models of a training with hafrm_ds alone, and one of them at a time"
        )
    from hafrm_ds.training.engine import check_build_tools
    from hafrm_ds.training.sharded_scoring import ShardedModel

    check_build_tools(processes.device)
    processes.start_group()
    return ShardedModel.load(saved, deepspeed, max_tokens, processes)
