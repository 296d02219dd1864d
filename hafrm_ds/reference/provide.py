"""Getting the reference log-probs of a run: look up, compute what is missing, check a sample."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist

from hafrm_ds.config import BatchConfig, TrainConfig
from hafrm_ds.data.prepared import PreparedGroups
from hafrm_ds.engine.engine import Engine
from hafrm_ds.errors import UserError
from hafrm_ds.model.lora import adapters_off
from hafrm_ds.model.token_logprobs import LOGPROB_VERSION
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.reference.check import check_sample
from hafrm_ds.reference.fingerprint import fingerprint_weights
from hafrm_ds.reference.offline_pass import (
    GroupSet,
    ReferenceLogprobs,
    Responses,
    StoredValues,
    Work,
    compute_missing,
)
from hafrm_ds.reference.store import Namespace, ReferenceStore, ShardWriter, StoreError, describe_namespaces


@dataclass
class ReferenceSource:
    """Where the reference log-probs of a run come from.

    store: the open namespace, on rank 0; None elsewhere.
    namespace: what values belong to, the same on all ranks.
    """

    config: TrainConfig
    store: ReferenceStore | None
    namespace: Namespace

    @classmethod
    def open(cls, config: TrainConfig, namespace: Namespace, processes: Processes, log: Console) -> "ReferenceSource":
        """Open the store, on rank 0.

        Args:
            namespace: as `shared_namespace` gives it.
        """
        store = None
        if processes.is_first:
            notes = {"model": config.model.name_or_path, "revision": config.model.revision}
            store = ReferenceStore(config.reference.store, namespace, notes, warn=log.warn)
        return cls(config, store, namespace)

    def look_up(self, sets: Sequence[GroupSet], device: torch.device) -> StoredValues:
        """What the store holds of the sets. All ranks call this together."""
        return StoredValues.look_up(self.store, sets, device)

    def compute(self, engine: Engine, work: Work, batch: BatchConfig, log: Console) -> np.ndarray:
        """Compute and store what is missing: [U] fp32, NaN for what was not."""
        config = self.config
        folder = config.reference.store / self.namespace.name
        with log.progress("reference log-probs", int(work.lengths.costs(batch.layout).sum()), "tokens") as progress:
            return compute_missing(
                engine,
                work,
                batch,
                ShardWriter(folder, self.namespace.name, provenance(engine), config.reference.flush_seconds),
                on_progress=progress.advance_for_all_ranks,
            )

    def explain_missing(self, num_missing: int, num_wanted: int) -> str:
        """What is missing and why it may be, from what else the store holds; the same text on all ranks."""
        message = [""]
        if self.store is not None:
            text = (
                f"the reference store {self.config.reference.store} lacks {num_missing:,} of {num_wanted:,} log-probs "
                f"of {self.config.model.name_or_path} in {self.config.model.dtype}. "
            )
            others = describe_namespaces(self.config.reference.store, self.namespace)
            if len(self.store):
                text += (
                    f"It has {len(self.store):,} others of these weights: the data is new, or the chat template, "
                    "data.max_length or data.truncation differ from the run that filled it"
                )
            else:
                text += f"It has values for {others}" if others else "It is empty"
            message = [text]
        dist.broadcast_object_list(message, src=0)
        return message[0]


def namespace_of(config: TrainConfig) -> Namespace:
    """What the log-probs of a run's start weights belong to. Adapters are no part of them, and training all weights of
    the same base has the same; a quantised base is another one."""
    quantize = config.model.lora.quantize
    kind = config.model.dtype if quantize == "none" else f"{config.model.dtype}-{quantize}"
    return Namespace(fingerprint_weights(config.model), kind, LOGPROB_VERSION)


def shared_namespace(config: TrainConfig, processes: Processes) -> Namespace:
    """`namespace_of`, found by one rank of each host, which fingerprints the weights there, and learned by all.

    Called before the process group is started: hashing a large model takes longer than a collective waits.

    Raises:
        UserError: the hosts have different weights.
    """
    reads = processes.local_rank == 0
    own = processes.in_turns("weights", lambda: asdict(namespace_of(config)) if reads else None)
    first = processes.from_first("namespace", lambda: own)
    processes.must_agree(f"the model {config.model.name_or_path}", {"weights": (own or first)["weights"]})
    return Namespace(**first)


def provenance(engine: Engine) -> dict:
    """Facts that move the last bits of a value and nothing else; each shard notes them."""
    return {
        "layout": engine.model.layout,
        "attention": engine.model.causal_lm.config._attn_implementation,
        "stock_logits": engine.model.uses_stock_logits,
        "zero_stage": engine.stage,
        "ranks": dist.get_world_size(),
        "device": str(engine.device.type),
    }


def provide_reference(
    source: ReferenceSource,
    engine: Engine,
    batch: BatchConfig,
    sets: Sequence[GroupSet],
    log: Console,
    record: Callable[[dict[str, float]], None],
) -> None:
    """Give the sets of a training run their reference log-probs, before its first step or before it is resumed: the
    policy is the reference still.

    Args:
        batch: with layout and token budget decided.
        sets: training set first.
        record: is told the figures of the check of a sample.

    Raises:
        UserError: values are missing and reference.on_missing is stop, or a sample does not agree with the store.
    """
    stored = source.look_up(sets, engine.device)
    from_store = sets[0].index[sets[0].are_whole(~np.isnan(stored.tables[0]))]
    if stored.num_missing:
        explanation = source.explain_missing(stored.num_missing, stored.num_wanted)
        if source.config.reference.on_missing == "stop":
            raise UserError(
                f"{explanation}. Run launch/precompute_reference.py with this config, or set "
                "--reference.on_missing compute"
            )
        log.print(f"{explanation}: computing them now")
        work = stored.missing(sets, batch)
        with adapters_off(engine.model.causal_lm):
            computed = source.compute(engine, work, batch, log)
        known = work.responses.out_of(stored.tables)
        work.responses.into(stored.tables, np.where(np.isnan(known), computed, known))
    else:
        log.print(f"all {stored.num_wanted:,} reference log-probs found in {source.config.reference.store}")
    for each, table in zip(sets, stored.tables, strict=True):
        each.reference = ReferenceLogprobs(table)
    check_sample(source.config, batch, engine, sets[0], from_store, log, record)


def precompute(
    source: ReferenceSource,
    processes: Processes,
    sets: Sequence[PreparedGroups],
    load_engine: Callable[[], tuple[Engine, BatchConfig]],
    log: Console,
) -> dict[str, float]:
    """The offline pass: every log-prob of every answer of `sets` into the store; only what is missing is computed.

    Args:
        load_engine: makes the scoring engine and decides layout and token budget; called only if something is missing.

    Returns:
        Figures of the pass, the same on all ranks.
    """
    started = time.perf_counter()
    config = source.config
    wanted = [GroupSet(groups, np.arange(len(groups))) for groups in sets]
    stored = source.look_up(wanted, processes.device)
    figures: dict[str, float] = {
        "pairs": sum(len(groups) for groups in sets),
        "responses": stored.num_wanted,
        "computed": stored.num_missing,
        "tokens": 0,
        "look_up_seconds": time.perf_counter() - started,
        "compute_seconds": 0.0,
    }
    if stored.num_missing:
        log.print(source.explain_missing(stored.num_missing, stored.num_wanted))
        engine, batch = load_engine()
        work = stored.missing(wanted, batch)
        started = time.perf_counter()
        source.compute(engine, work, batch, log)
        figures["tokens"] = int(work.lengths.costs(batch.layout).sum())
        figures["compute_seconds"] = time.perf_counter() - started
    dist.barrier()
    if source.store is not None:
        source.store.refresh()
        if left := int(source.store.missing(Responses.of(wanted).keys).sum()):
            raise StoreError(f"{left} values are missing after the pass: do all nodes see {config.reference.store}?")
        figures["stored_bytes"] = source.store.num_bytes
    return figures
