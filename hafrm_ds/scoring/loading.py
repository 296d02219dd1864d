"""A model for a scoring job: a copy on each process, or one sharded over all of them."""

from pathlib import Path

from hafrm_ds.errors import ModelError
from hafrm_ds.model.classifier import SavedClassifier
from hafrm_ds.model.opening import Saved, load_scorer
from hafrm_ds.model.scorer import Scorer
from hafrm_ds.training.processes import Processes


def load_for_job(saved: Saved, deepspeed: Path | None, max_tokens: int, processes: Processes) -> Scorer:
    """Load a model; all processes call this together.

    Args:
        deepspeed: a DeepSpeed JSON, if the model is sharded.

    Raises:
        ModelError: the model cannot be loaded, or not so.
    """
    if deepspeed is None:
        processes.use_device()
        return load_scorer(saved, processes.device, max_tokens)
    if isinstance(saved, SavedClassifier) or "layout" not in saved.metadata:
        raise ModelError(f"{saved.folder}: --deepspeed shards models of a training with hafrm_ds alone")
    from hafrm_ds.training.engine import check_build_tools
    from hafrm_ds.training.sharded_scoring import ShardedModel

    check_build_tools(processes.device)
    processes.start_group()
    return ShardedModel.load(saved, deepspeed, max_tokens, processes)
