"""Floating-point operations of a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hafrm_ds.data.packing import PackedBatch


@dataclass(frozen=True)
class ForwardCost:
    """Floating-point operations of one forward pass, and of the backward pass after it.

    per_token: matrix products of the body for one token. per_response_token: the LM head for one predicted token.
    per_visible_key: attention scores and their sum over values, for one query that sees one key, over all layers.
    trained_share, trained_head_share: of the first two, what belongs to weights that are trained.

    A multiplication and its addition count as two. In backward the gradients of a product's inputs cost what it costs
    in forward, and those of its weights as much again where they are trained; attention has two inputs. Recomputation
    under gradient checkpointing is not counted, as usual for MFU; sliding windows are counted as if they were open.
    """

    per_token: float
    per_response_token: float
    per_visible_key: float
    trained_share: float
    trained_head_share: float

    @classmethod
    def of(
        cls,
        causal_lm: PreTrainedModel,
        shape_of: Callable[[nn.Parameter], Sequence[int]] = lambda parameter: parameter.shape,
    ) -> "ForwardCost":
        """The cost of a causal LM.

        Args:
            shape_of: the shape of a parameter, which one that is sharded or quantised does not show itself.
        """

        def numel(parameter: nn.Parameter) -> int:
            return int(np.prod(shape_of(parameter)))

        config: PretrainedConfig = causal_lm.config.get_text_config()
        head = causal_lm.get_output_embeddings().weight
        embedding = causal_lm.get_input_embeddings().weight
        matrices = [
            parameter
            for parameter in causal_lm.parameters()
            if parameter is not head and parameter is not embedding and len(shape_of(parameter)) == 2
        ]
        body = sum(map(numel, matrices))
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            per_token=2.0 * body,
            per_response_token=2.0 * numel(head),
            per_visible_key=4.0 * config.num_hidden_layers * config.num_attention_heads * head_dim,
            trained_share=sum(numel(parameter) for parameter in matrices if parameter.requires_grad) / body,
            trained_head_share=float(head.requires_grad),
        )

    def training_flops(self, batch: PackedBatch, with_logprob: bool) -> float:
        """Operations of forward and backward that the batch needs; padding is not among them."""
        body, head, attention = self.parts(batch, with_logprob)
        return (2 + self.trained_share) * body + (2 + self.trained_head_share) * head + 3 * attention

    def parts(self, batch: PackedBatch, with_logprob: bool) -> tuple[float, float, float]:
        """Operations of one forward pass: (body, LM head, attention)."""
        if batch.segments is not None:
            q, k = np.array(batch.segments.q_lengths), np.array(batch.segments.k_lengths)
        else:
            assert batch.attention_mask is not None  # a padded batch has one
            q = k = batch.attention_mask.sum(1).numpy()
        visible_keys = (q * (k - q) + q * (q + 1) // 2).sum()
        return self.parts_of(q.sum(), len(batch.target_ids) if with_logprob else 0, visible_keys)

    def parts_of(self, tokens: float, response_tokens: float, visible_keys: float) -> tuple[float, float, float]:
        """The same from counts: tokens of the body, predicted tokens, and keys that each query sees, summed."""
        return self.per_token * tokens, self.per_response_token * response_tokens, self.per_visible_key * visible_keys
