"""Summed log-probs of the reference in a store against TRL's, for the same pairs and weights.

    python tests/benchmarks/reference_agreement.py STORE --config FILE.yaml [--section.key value ...]

The store has been filled by launch/precompute_reference.py with the same options. Runs TRL's own
DPOTrainer.compute_ref_log_probs on the pairs of data.train, in fp32 on the CPU, and prints the largest differences.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.preparation import prepare_groups
from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.model.loading import load_tokenizer
from hafrm_ds.model.token_logprobs import LOGPROB_VERSION
from hafrm_ds.reference.fingerprint import fingerprint_weights
from hafrm_ds.reference.store import Namespace, ReferenceStore


def trl_logprobs(config, pairs, tokenizer) -> np.ndarray:
    """[pairs, 2] by TRL, from our token ids (its own tokenisation of these pairs is compared in tests/)."""
    model = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    columns = [dict(zip(names, map(list, (pair.prompt_ids, *pair.responses)), strict=True)) for pair in pairs]
    text = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.DPOConfig(
            output_dir=folder, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None
        )
        trainer = trl.DPOTrainer(
            model, None, arguments, train_dataset=Dataset.from_list(text), processing_class=tokenizer
        )
        rows = []
        for column in columns:
            with torch.no_grad():
                chosen, rejected = trainer.compute_ref_log_probs(model, trainer.data_collator([column]))
            rows.append((float(chosen), float(rejected)))
    return np.array(rows)


def main() -> None:
    config = load_config(sys.argv[2:])
    tokenizer = load_tokenizer(config.model)
    formatter = ChatFormatter.create(tokenizer, config.data.chat_template, config.data.template_date)
    pairs = prepare_groups(
        config.data.train, formatter=formatter, options=config.data.preparation, role="train", seed=config.seed
    )
    namespace = Namespace(fingerprint_weights(config.model), config.model.dtype, LOGPROB_VERSION)
    stored = ReferenceStore(Path(sys.argv[1]), namespace).logprobs(pairs.keys).reshape(-1, 2)
    theirs = trl_logprobs(config, pairs, formatter.tokenizer)
    difference = np.abs(stored - theirs)
    print(
        f"{len(pairs)} pairs, values {stored.min():.1f} to {stored.max():.1f}: largest difference "
        f"{difference.max():.2g} nats, relative {(difference / np.abs(theirs)).max():.2g}"
    )


if __name__ == "__main__":
    main()
