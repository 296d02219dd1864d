"""The hybrid reward model: one transformer body, the language-model head it came with and a scalar reward head.

Legend: T tokens, N responses, M response tokens, H hidden, V vocabulary.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hafrm_ds.config import ObjectiveConfig
from hafrm_ds.data.filler import with_filler
from hafrm_ds.data.packing import PackedBatch, lay_out
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.errors import ModelError
from hafrm_ds.model.attention import import_problem, set_attention, stock_attention
from hafrm_ds.model.experts import router_use
from hafrm_ds.model.token_logprobs import HeadTransform, Softmax, token_logprobs
from hafrm_ds.objective import ResponseScores

if TYPE_CHECKING:
    from hafrm_ds.model.fused import FusedLayers


class ScoreHead(nn.Linear):
    """H -> A. Its weight has the body's dtype (DeepSpeed shards one dtype at a time); its product is fp32."""

    def forward(self, states: Tensor) -> Tensor:
        """[N, H] -> [N, A] fp32."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(states.float(), self.weight.float(), bias)


class RewardHead(ScoreHead):
    """H -> 1."""

    def forward(self, states: Tensor) -> Tensor:
        """[N, H] -> [N] fp32."""
        return super().forward(states).squeeze(-1)


class ResponseLogprobs(nn.Module):
    """Log-probs of response tokens through a causal LM's output embedding.

    A module of its own without parameters: under ZeRO-3 the head's weight is gathered when it is entered, once in
    forward and once in backward, and dropped behind it (`Engine` registers the weight with it).

    Attributes:
        softmax: what computes with a block of logits; None: torch, as suits the device.
    """

    def __init__(self, transform: HeadTransform):
        super().__init__()
        self.transform = transform
        self.softmax: Softmax | None = None

    def forward(self, states: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        """[M, H] states that predict `targets` [M] -> [M] fp32."""
        return token_logprobs(states, head.weight, head.bias, targets, self.transform, self.softmax)


class HybridModel(nn.Module):
    """A causal LM with a reward head beside its LM head, and perhaps one of attributes, [A, H]. All read the same
    forward pass of the body.

    Attributes:
        layout: of the micro-batches that its attention is set for (`use_layout`); until then every model takes padded.
        uses_stock_logits: take log-probs from the causal LM's own [T, V] logits instead of the fused function, for a
            model whose LM head does something that `HeadTransform` does not know (`lm_head_difference`).
        fused: what is fused in its layers (`use_fused`); None: nothing.
    """

    def __init__(self, causal_lm: PreTrainedModel, reward_head: RewardHead, attribute_head: ScoreHead | None = None):
        super().__init__()
        self.causal_lm = causal_lm
        self.reward_head = reward_head
        self.attribute_head = attribute_head
        self.response_logprobs = ResponseLogprobs(head_transform(causal_lm.config))
        self.layout = "padded"
        self.uses_stock_logits = False
        self.fused: FusedLayers | None = None

    def use_layout(self, layout: str, attention: str, device: torch.device) -> None:
        """Set the attention for a layout, or with "auto" for the best that the model can.

        Args:
            attention: name of a kernel, or "auto" for the best that runs on `device`.

        Raises:
            ModelError: the model cannot run in this layout, or not under this kernel.
        """
        self.layout = set_attention(self.causal_lm, layout, attention, device)

    def use_log_probs(self, kind: str, device: torch.device) -> None:
        """Set what computes log-probs, by the names of model.log_probs.

        Raises:
            ModelError: it cannot run on `device`.
        """
        check_log_probs(kind, device)
        if kind == "torch":
            self.response_logprobs.softmax = None
            return
        from hafrm_ds.model.softmax_kernels import TritonSoftmax

        self.response_logprobs.softmax = TritonSoftmax()

    def use_fused(self, kind: str, device: torch.device) -> None:
        """Set what computes norms, rotary embeddings and gates, by the names of model.fused, once for a model.

        Raises:
            ModelError: it cannot run on `device`, or knows nothing in the model.
        """
        if kind == "off" or (kind == "auto" and device.type != "cuda"):
            return  # importing the families takes a while
        from hafrm_ds.model.fused import fused_layers

        self.fused = fused_layers(self.causal_lm, kind, device)

    def forward(
        self,
        batch: PackedBatch,
        with_reward: bool = True,
        with_logprob: bool = True,
        idle_heads: bool = False,
        with_router: bool = False,
    ) -> ResponseScores:
        """Score the N responses of a micro-batch.

        Args:
            with_reward: read the reward head, and that of attributes.
            with_logprob: run the LM head, at the positions that predict a response token and nowhere else.
            idle_heads: the head that is not asked is trained in other steps. It runs on no position, which costs
                nothing and gives its weights the gradient 0: ZeRO-3 would else step them by their last gradient again,
                and would meet another sequence of modules than the one that it fetches weights by.
            with_router: of a mixture of experts that gives its routers' logits, for a batch of pairs, also the use of
            its experts.
        """
        logprob = reward = per_token = attributes = None
        filled = self.with_filler(batch)
        asked = {"output_router_logits": True} if with_router else {}
        if with_logprob and self.uses_stock_logits:
            output, per_token = self.output_and_stock_logprobs(filled, **asked)
            states = output.last_hidden_state.flatten(0, 1)
        else:
            output = self.causal_lm.get_decoder()(**model_inputs(filled), **asked)
            states = output.last_hidden_state.flatten(0, 1)  # [T, H]
            if with_logprob:
                per_token = self.response_logprobs(states[filled.predict_index], self.lm_head, filled.target_ids)
        if per_token is not None:
            per_token = per_token[: len(batch.target_ids)]
            logprob = sum_by_response(per_token, batch)
        elif idle_heads:
            nothing = self.response_logprobs(states[:0], self.lm_head, batch.target_ids[:0]).sum()
        if with_reward:
            read_out = states[batch.readout_index]
            reward = self.reward_head(read_out)
            attributes = None if self.attribute_head is None else self.attribute_head(read_out)
        elif idle_heads:
            nothing = torch.cat([head(states[:0]).flatten() for head in self.score_heads]).sum()
        if idle_heads and logprob is None:
            reward = reward + nothing
        elif idle_heads and reward is None:
            logprob = logprob + nothing
        router = None
        if with_router:
            logits = [each[: batch.num_positions] for each in output.router_logits]
            router = router_use(logits, self.causal_lm, batch)
        return ResponseScores(reward, logprob, batch.num_tokens, per_token, router, attributes)

    def with_filler(self, batch: PackedBatch) -> PackedBatch:
        """A micro-batch as the model computes it: where each shape is compiled anew, at one of few sizes."""
        weight = self.reward_head.weight
        compiles = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)
        return with_filler(batch) if compiles and batch.segments is not None else batch

    @property
    def lm_head(self) -> nn.Linear:
        return self.causal_lm.get_output_embeddings()

    @property
    def score_heads(self) -> list[ScoreHead]:
        """The heads that came to the causal LM."""
        return [self.reward_head] if self.attribute_head is None else [self.reward_head, self.attribute_head]

    def shared_parameters(self) -> list[nn.Parameter]:
        """What both losses train: the body or its adapters, with the embedding where the LM head is tied to it."""
        heads = {parameter for head in (*self.score_heads, self.lm_head) for parameter in head.parameters()}
        heads -= {*self.causal_lm.get_input_embeddings().parameters()}
        return [parameter for parameter in self.parameters() if parameter.requires_grad and parameter not in heads]

    def output_and_stock_logprobs(self, batch: PackedBatch, **asked: bool) -> tuple[ModelOutput, Tensor]:
        """The decoder's output, and log-probs [M] fp32 from the causal LM's own logits, held for all tokens."""
        captured = []
        hook = self.causal_lm.get_decoder().register_forward_hook(
            lambda module, inputs, output: captured.append(output)
        )
        try:
            logits = self.causal_lm(**model_inputs(batch), **asked).logits.flatten(0, 1)[batch.predict_index]
        finally:
            hook.remove()
        logprobs = logits.float().log_softmax(-1).gather(1, batch.target_ids[:, None]).squeeze(1)
        return captured[0], logprobs


def check_log_probs(kind: str, device: torch.device) -> None:
    """Raises ModelError if `kind`, a name of model.log_probs, cannot run on a device."""
    if kind == "torch":
        return
    problem = import_problem("triton") or ("" if device.type == "cuda" else f"it runs on GPUs, not on {device}")
    if problem and not os.environ.get("TRITON_INTERPRET"):
        raise ModelError(f"model.log_probs {kind} cannot be used: {problem}. Leave it at torch")


def model_inputs(batch: PackedBatch) -> dict:
    layout = {"attention_mask": batch.attention_mask} if batch.segments is None else {"segments": batch.segments}
    return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False, **layout}


def sum_by_response(per_token: Tensor, batch: PackedBatch) -> Tensor:
    """[M] -> [N], both fp32. In a fixed order on every device, so that equal tokens give equal sums."""
    return torch.segment_reduce(per_token, "sum", lengths=batch.num_tokens, unsafe=True)


def make_reward_head(hidden_size: int, *, bias: bool, init: str, dtype: torch.dtype, seed: int) -> RewardHead:
    """N(0, 1/(H + 1)) (Ouyang et al. 2022) or zero; the same on every rank that gives the same seed.

    Made before the model is sharded: under zero.Init an initialiser finds an empty tensor and does nothing.
    """
    head = RewardHead(hidden_size, 1, bias=bias, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        if init != "normal":  # a head that is taken over gets its values afterwards
            head.weight.zero_()
        else:
            generator = torch.Generator().manual_seed(seed)
            head.weight.normal_(0.0, 1 / math.sqrt(hidden_size + 1), generator=generator)
        if bias:
            head.bias.zero_()
    return head.to(dtype)


def make_attribute_head(hidden_size: int, names: Sequence[str], dtype: torch.dtype) -> ScoreHead | None:
    """Of zeros, so that it starts with what its bias says of every answer; None where there are no attributes.

    Its bias is to be the mean of each attribute, the best constant. A random weight would add noise to it, which the
    regression would first have to take back, by way of the body too.
    """
    if not names:
        return None
    head = ScoreHead(hidden_size, len(names), device="cpu", dtype=torch.float32)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head.to(dtype)


def head_transform(config) -> HeadTransform:
    """Scales and caps that a model's forward applies around its LM head, by the names transformers gives them."""
    config = config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    if divisor := getattr(config, "logits_scaling", None):
        scale /= divisor
    return HeadTransform(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout and layer-drop probability to 0, in modules and in attributes that functional calls read.

    The model can then stay in train mode, which gradient checkpointing needs, and compute what it computes in eval.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)


def freeze_unused_heads(model: HybridModel, objective: ObjectiveConfig) -> None:
    """A head whose loss has no weight is not trained. A tied LM head is the embedding, which is."""
    if not objective.uses_reward:
        model.reward_head.requires_grad_(False)
    head, embedding = model.lm_head, model.causal_lm.get_input_embeddings()
    if not objective.uses_policy and head.weight is not embedding.weight:
        head.requires_grad_(False)


def lm_head_difference(model: HybridModel, forward: Callable[..., ResponseScores], batch: PackedBatch) -> float:
    """Largest difference, in nats a token, of the fused log-probs of `batch` and those of the stock model's own logits.

    A causal LM may do more around its head than `HeadTransform` knows. All ranks call this together.

    Args:
        forward: runs `model` (the engine around it, which gathers sharded weights).
    """
    with torch.no_grad():
        fused = forward(batch, with_reward=False).logprob
        assert fused is not None
        _, per_token = model.output_and_stock_logprobs(batch)
    return ((fused - sum_by_response(per_token, batch)).abs() / batch.num_tokens).max().item()


def layout_difference(
    model: HybridModel,
    forward: Callable[..., ResponseScores],
    items: Sequence[PromptWithResponses],
    layout: str,
    with_logprob: bool,
) -> float:
    """Largest difference between `layout` and padded, separate sequences, relative to 1 + the value: in a reward or,
    if asked for, in nats a token.

    The padded ones run under the stock attention of the model. Not every model that takes our attention keeps packed
    answers apart: state-space layers and convolutions run on over the boundary.

    Raises:
        ModelError: scores are not finite.
        UnsupportedAttention: the model cannot run in `layout`.
    """
    with torch.no_grad():
        scores = forward(lay_out(items, layout), with_logprob=with_logprob)
        with under_stock_attention(model.causal_lm):
            padded = forward(lay_out(items, "padded"), with_logprob=with_logprob)
    return scores_difference(model, scores, padded)


def fused_difference(
    model: HybridModel,
    forward: Callable[..., ResponseScores],
    items: Sequence[PromptWithResponses],
    with_logprob: bool,
) -> float:
    """As `layout_difference`, between the fused layers of a model and transformers' own, in the model's layout."""
    with torch.no_grad():
        scores = forward(lay_out(items, model.layout), with_logprob=with_logprob)
        with nullcontext() if model.fused is None else model.fused.taken_away():
            own = forward(lay_out(items, model.layout), with_logprob=with_logprob)
    return scores_difference(model, scores, own)


def scores_difference(model: HybridModel, ours: ResponseScores, expected: ResponseScores) -> float:
    """Largest difference relative to 1 + the value. Raises ModelError if any is not finite."""

    def compared(each: ResponseScores) -> list[Tensor]:
        assert each.reward is not None
        if each.logprob is None:
            return [each.reward]
        return [each.reward, each.logprob / each.num_tokens.to(each.logprob.device)]

    pairs = list(zip(compared(ours), compared(expected), strict=True))
    if not all(values.isfinite().all() for pair in pairs for values in pair):
        raise ModelError(
            f"{type(model.causal_lm).__name__} gives scores that are not finite before any training: its weights hold "
            f"NaN or infinity, or overflow in {model.reward_head.weight.dtype}"
        )
    return max(((a - b).abs() / (1 + b.abs())).max().item() for a, b in pairs)


@contextmanager
def under_stock_attention(causal_lm: PreTrainedModel) -> Iterator[None]:
    """Inside, a causal LM runs padded batches under its stock attention; afterwards under its own again."""
    own = causal_lm.config._attn_implementation
    causal_lm.set_attn_implementation(stock_attention(causal_lm))
    try:
        yield
    finally:
        causal_lm.set_attn_implementation(own)


def tolerance_of(model: HybridModel) -> float:
    """Largest difference that rounding explains, in a reward or in nats a token."""
    return 1e-4 if model.reward_head.weight.dtype == torch.float32 else 0.1
