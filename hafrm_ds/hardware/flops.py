"""Floating-point operations of a model, of which a token takes the experts that it is sent to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PretrainedConfig, PreTrainedModel

from hafrm_ds.data.packing import PackedBatch

EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
"""Names that configurations have for the number of experts that a token is sent to."""
Shape = Callable[[nn.Parameter], Sequence[int]]
Numbers = TypeVar("Numbers", float, np.ndarray)


def own_shape(parameter: nn.Parameter) -> Sequence[int]:
    return parameter.shape


def holds_experts(module: nn.Module, shape_of: Shape = own_shape) -> bool:
    """Whether a module has the weights of several experts, each of its matrices for all of them as one parameter of
    three dimensions, as transformers 5 has them."""
    own = module.parameters(recurse=False)
    return not isinstance(module, _ConvNd) and any(len(shape_of(parameter)) == 3 for parameter in own)


def experts_of_a_token(config: PretrainedConfig) -> int | None:
    """Experts that a token is sent to; None where a configuration does not say it by one number."""
    config = config.get_text_config()
    found = (getattr(config, name, None) for name in EXPERTS_OF_A_TOKEN)
    return next((number for number in found if isinstance(number, int)), None)


def shares_of_experts(causal_lm: PreTrainedModel, shape_of: Shape = own_shape) -> dict[nn.Parameter, float]:
    """Parameter -> share of its weights that a token's products take, for those that hold several experts; all of them
    where a configuration does not say how many a token is sent to, and none of a bias."""
    top_k, shares = experts_of_a_token(causal_lm.config), {}
    for module in causal_lm.modules():
        if holds_experts(module, shape_of):
            for parameter in module.parameters(recurse=False):
                number, *matrix = shape_of(parameter)
                shares[parameter] = (1.0 if top_k is None else min(1.0, top_k / number)) * (len(matrix) == 2)
    return shares


@dataclass(frozen=True)
class ForwardCost:
    """Floating-point operations of one forward pass, and of the backward pass after it.

    per_token: matrix products of the body for one token, with as many experts as it is sent to. per_response_token:
    the LM head for one predicted token.
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
        shape_of: Shape = own_shape,
    ) -> "ForwardCost":
        """The cost of a causal LM.

        Args:
            shape_of: the shape of a parameter, which one that is sharded or quantised does not show itself.
        """

        shares = shares_of_experts(causal_lm, shape_of)

        def numel(parameter: nn.Parameter) -> float:
            return shares.get(parameter, 1.0) * float(np.prod(shape_of(parameter)))

        config: PretrainedConfig = causal_lm.config.get_text_config()
        head = causal_lm.get_output_embeddings().weight
        embedding = causal_lm.get_input_embeddings().weight
        matrices = [
            parameter
            for parameter in causal_lm.parameters()
            if parameter is not head
            and parameter is not embedding
            and (len(shape_of(parameter)) == 2 or parameter in shares)
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
        return self.training(*self.parts(batch, with_logprob))

    def training(self, body: Numbers, head: Numbers, attention: Numbers) -> Numbers:
        """Operations of forward and backward from those of a forward pass, as `parts` gives them."""
        return (2 + self.trained_share) * body + (2 + self.trained_head_share) * head + 3 * attention

    def parts(self, batch: PackedBatch, with_logprob: bool) -> tuple[float, float, float]:
        """Operations of one forward pass: (body, LM head, attention)."""
        if batch.segments is not None:
            q, k = np.array(batch.segments.q_lengths), np.array(batch.segments.k_lengths)
        else:
            assert batch.row_lengths is not None  # a padded batch has them
            q = k = np.array(batch.row_lengths)
        visible_keys = (q * (k - q) + q * (q + 1) // 2).sum()
        return self.parts_of(q.sum(), len(batch.target_ids) if with_logprob else 0, visible_keys)

    def parts_of(
        self, tokens: Numbers, response_tokens: Numbers, visible_keys: Numbers
    ) -> tuple[Numbers, Numbers, Numbers]:
        """The same from counts: tokens of the body, predicted tokens, and keys that each query sees, summed."""
        return self.per_token * tokens, self.per_response_token * response_tokens, self.per_visible_key * visible_keys
