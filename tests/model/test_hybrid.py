"""The hybrid model against the stock model on padded, separate sequences, for every family."""

import gc
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from hafrm_ds.config import ObjectiveConfig
from hafrm_ds.data import packing
from hafrm_ds.data.comparisons import Comparisons
from hafrm_ds.data.filler import with_filler
from hafrm_ds.data.packing import lay_out
from hafrm_ds.data.pairs import Comparison
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.errors import ModelError
from hafrm_ds.model import token_logprobs
from hafrm_ds.model.attention import UnsupportedAttention
from hafrm_ds.model.hybrid import (
    HybridModel,
    disable_dropout,
    layout_difference,
    lm_head_difference,
    make_attribute_head,
    make_reward_head,
    sum_by_response,
    tolerance_of,
)
from hafrm_ds.model.recomputation import set_gradient_checkpointing
from hafrm_ds.model.token_logprobs import HeadTransform
from hafrm_ds.objective import LossWeights, joint_loss
from tests.tiny_models import FAMILIES, random_items, tiny_causal_lm, tiny_hybrid, use_layout


def run(model: HybridModel, items: list[PromptWithResponses], layout: str):
    """Rewards, log-probs and gradients of the joint loss over all comparisons, the first answer best, in one layout."""
    use_layout(model, layout)
    model.zero_grad()
    scores = model(lay_out(items, layout))
    reference = torch.full_like(scores.logprob, -20.0)
    numbers = [len(item.responses) for item in items]
    every = [[Comparison(*both) for both in itertools.combinations(range(number), 2)] for number in numbers]
    comparisons = Comparisons.of(list(zip(numbers, every, strict=True)))
    joint_loss(ObjectiveConfig(), LossWeights(1.0, 1.0), scores, reference, comparisons).total.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return scores.reward.detach(), scores.logprob.detach(), gradients


def assert_gradients_close(actual: dict, expected: dict, tolerance: float) -> None:
    """Relative to the largest gradient entry of the model: a key bias, whose true gradient is 0, has only noise."""
    assert actual.keys() == expected.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name in expected:
        assert (actual[name] - expected[name]).abs().max().item() <= tolerance * scale, name


ITEMS = {
    "pairs": random_items(seed=3),
    "groups": [
        *random_items(seed=4, num_items=1, num_responses=4),
        *random_items(seed=5, num_items=1, num_responses=3),
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
@pytest.mark.parametrize("items", ITEMS.values(), ids=ITEMS)
def test_layouts_equal_padded_separate_sequences(family, layout, items):
    model = tiny_hybrid(family)
    reward, logprob, gradients = run(model, items, "padded")
    packed_reward, packed_logprob, packed_gradients = run(model, items, layout)
    torch.testing.assert_close(packed_reward, reward, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed_logprob, logprob, rtol=1e-4, atol=1e-5)
    assert_gradients_close(packed_gradients, gradients, 1e-4)


@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
def test_filler_changes_nothing(layout, monkeypatch):
    model, items = tiny_hybrid("gemma2"), random_items(seed=3)
    reward, logprob, gradients = run(model, items, layout)
    monkeypatch.setattr(model, "with_filler", with_filler)
    filled_reward, filled_logprob, filled_gradients = run(model, items, layout)
    torch.testing.assert_close(filled_reward, reward, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(filled_logprob, logprob, rtol=1e-6, atol=1e-6)
    assert_gradients_close(filled_gradients, gradients, 1e-6)


@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
def test_products_that_are_compiled_have_few_shapes(layout):
    """oneDNN compiles one in bfloat16 for each number of rows."""
    model, rows = tiny_hybrid("llama").to(torch.bfloat16), set()
    use_layout(model, layout)
    for module in model.causal_lm.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: rows.add(inputs[0].shape[-2]))
    for seed in range(20):
        batch = lay_out(random_items(seed=seed), layout)
        scores = model(batch)
        assert len(scores.token_logprobs) == len(batch.target_ids)
        assert model.with_filler(batch).num_positions in rows
    assert all(number % 16 == 0 for number in rows)


def weighted_run(model: HybridModel, items: list[PromptWithResponses], layout: str):
    """Scores, and the gradients of a sum in which every reward and log-prob has a weight of its own."""
    use_layout(model, layout)
    model.zero_grad()
    scores = model(lay_out(items, layout))
    weights = torch.linspace(-1, 2, len(scores.reward))
    (weights @ scores.reward + weights.flip(0) @ scores.logprob).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return scores.reward.detach(), scores.logprob.detach(), gradients


def assert_layouts_agree(model: HybridModel, items: list[PromptWithResponses]) -> None:
    reward, logprob, gradients = weighted_run(model, items, "padded")
    for layout in ("shared_prefix", "packed"):
        packed_reward, packed_logprob, packed_gradients = weighted_run(model, items, layout)
        torch.testing.assert_close(packed_reward, reward, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(packed_logprob, logprob, rtol=1e-4, atol=1e-5)
        assert_gradients_close(packed_gradients, gradients, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_responses", [1, 2, 5])
def test_any_number_of_responses_and_single_tokens(family, num_responses):
    """Best-of-N lays out one prompt with N answers; prompts and answers of one token are the corner of every index."""
    single = PromptWithResponses([5], tuple([7 + n] for n in range(num_responses)))
    items = [single, *random_items(seed=11, num_items=2, num_responses=num_responses), single]
    assert_layouts_agree(tiny_hybrid(family), items)


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 20), st.lists(st.integers(1, 12), min_size=1, max_size=4)), min_size=1, max_size=4
    ),
    family=st.sampled_from(["llama", "qwen2", "gemma2", "gpt-neox"]),
)
def test_layouts_agree_on_any_shape(shapes, family):
    source = random.Random(0)

    def tokens(length: int) -> list[int]:
        return [source.randrange(3, 120) for _ in range(length)]

    items = [PromptWithResponses(tokens(prompt), tuple(map(tokens, responses))) for prompt, responses in shapes]
    assert_layouts_agree(tiny_hybrid(family), items)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
def test_a_pair_scores_the_same_in_twenty_different_batches(family, layout):
    model, (pair,) = tiny_hybrid(family), random_items(seed=21, num_items=1)
    use_layout(model, layout)
    rewards, logprobs = [], []
    for seed in range(20):
        neighbours = random_items(seed=100 + seed, num_items=1 + seed % 7)
        place = seed % (len(neighbours) + 1)
        with torch.no_grad():
            scores = model(lay_out([*neighbours[:place], pair, *neighbours[place:]], layout))
        rewards.append(scores.reward[2 * place : 2 * place + 2])
        logprobs.append(scores.logprob[2 * place : 2 * place + 2])
    for values in (torch.stack(rewards), torch.stack(logprobs)):
        spread = values.max(dim=0).values - values.min(dim=0).values
        assert (spread <= 1e-5 * (1 + values.abs().max(dim=0).values)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_stock_model_on_one_sequence_at_a_time(family):
    """Nothing of ours but the model: the stock forward on each sequence alone, log-softmax of its own logits."""
    model, items = tiny_hybrid(family), random_items(seed=5)
    use_layout(model, "shared_prefix")
    with torch.no_grad():
        scores = model(lay_out(items, "shared_prefix"))
        use_layout(model, "padded")
        expected_reward, expected_logprob = [], []
        for item in items:
            for response in item.responses:
                ids = torch.tensor([[*item.prompt, *response]])
                logprobs = model.causal_lm(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
                own = range(len(item.prompt) - 1, ids.shape[1] - 1)
                expected_logprob.append(sum(logprobs[t, ids[0, t + 1]] for t in own))
                states = model.causal_lm.get_decoder()(ids, use_cache=False).last_hidden_state
                expected_reward.append(F.linear(states[0, -1], model.reward_head.weight).squeeze())
    torch.testing.assert_close(scores.reward, torch.stack(expected_reward), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.logprob.double(), torch.stack(expected_logprob), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
def test_a_score_does_not_depend_on_the_batch_it_stands_in(family, layout):
    """Neither tokens nor padding of the neighbours, nor the item's place among them."""
    model, items = tiny_hybrid(family), random_items(seed=8, num_items=5)
    use_layout(model, layout)
    with torch.no_grad():
        together = model(lay_out(items, layout))
        for place, item in enumerate(items):
            alone = model(lay_out([item], layout))
            own = slice(2 * place, 2 * place + 2)
            torch.testing.assert_close(together.reward[own], alone.reward, rtol=0, atol=1e-5)
            torch.testing.assert_close(together.logprob[own], alone.logprob, rtol=1e-5, atol=1e-5)


def test_which_id_fills_the_padding_never_matters(monkeypatch):
    model, items = tiny_hybrid("llama"), random_items(seed=8)
    use_layout(model, "padded")
    with torch.no_grad():
        first = model(lay_out(items, "padded"))
        monkeypatch.setattr(packing, "IGNORED_PADDING_ID", items[0].responses[0][-1])
        second = model(lay_out(items, "padded"))
    assert torch.equal(first.reward, second.reward)
    assert torch.equal(first.logprob, second.logprob)


def saved_bytes(forward) -> int:
    """Bytes that are held on to between forward and backward, by autograd or by any object, parameters apart."""
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not (tensor._base is not None and tensor._base.is_leaf):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = forward()
    gc.collect()  # what earlier tests left behind
    for found in gc.get_objects():
        if type(found) is torch.Tensor:
            note(found)
    del kept
    return sum(storages.values())


def test_no_logits_are_held_for_backward(monkeypatch):
    """A chunked log-softmax that keeps each chunk for backward saves nothing."""
    vocabulary, block_bytes = 50_000, 2**20
    monkeypatch.setattr(token_logprobs, "BLOCK_BYTES", block_bytes)
    causal_lm = tiny_causal_lm("llama", vocab_size=vocabulary)
    model = HybridModel(causal_lm, make_reward_head(32, bias=False, init="normal", dtype=torch.float32, seed=0))
    use_layout(model, "shared_prefix")
    batch = lay_out(random_items(seed=2, num_items=8), "shared_prefix")
    logits_bytes = 4 * len(batch.target_ids) * vocabulary
    assert logits_bytes > 10 * block_bytes

    largest = []
    original = token_logprobs.product
    monkeypatch.setattr(
        token_logprobs, "product", lambda *given: largest.append((made := original(*given)).nbytes) or made
    )
    with_head = saved_bytes(lambda: model(batch))
    body = saved_bytes(lambda: model(batch, with_logprob=False))
    assert with_head - body < 0.01 * logits_bytes
    assert len(largest) > 10 and max(largest) <= block_bytes
    model.uses_stock_logits = True  # which does hold them: what is measured here can be seen
    assert saved_bytes(lambda: model(batch)) - body > logits_bytes


def test_the_lm_head_is_entered_once_in_forward_and_once_in_backward_whatever_the_blocks(monkeypatch):
    """Entering the module is what gathers the head's weight under ZeRO-3."""
    monkeypatch.setattr(token_logprobs, "BLOCK_BYTES", 1)  # a token a block
    model, entered = tiny_hybrid("llama"), []
    use_layout(model, "shared_prefix")
    module = model.response_logprobs
    module.register_forward_pre_hook(lambda *_: entered.append("forward"))
    module.register_full_backward_pre_hook(lambda *_: entered.append("backward"))
    model(lay_out(random_items(seed=2), "shared_prefix")).logprob.sum().backward()
    assert entered == ["forward", "backward"]


def test_sums_over_a_response_are_fp32():
    """bf16 steps at a sum of 600 are 4 nats."""
    per_token = -3 * torch.rand(4000, generator=torch.Generator().manual_seed(0))
    batch = lay_out([PromptWithResponses([5], ([6] * 1000, [7] * 3000))], "shared_prefix")
    summed = sum_by_response(per_token, batch)
    expected = torch.stack([part.double().sum() for part in per_token.split([1000, 3000])])
    assert summed.dtype == torch.float32
    torch.testing.assert_close(summed.double(), expected, rtol=1e-6, atol=1e-3)


def test_gradient_checkpointing_changes_nothing():
    items = random_items(seed=1)
    model = tiny_hybrid("llama")
    reward, logprob, gradients = run(model, items, "shared_prefix")
    set_gradient_checkpointing(model.causal_lm, True)
    again_reward, again_logprob, again_gradients = run(model, items, "shared_prefix")
    assert torch.equal(again_reward, reward)
    assert torch.equal(again_logprob, logprob)
    assert_gradients_close(again_gradients, gradients, 1e-6)


def test_dropout_is_off_in_train_mode():
    causal_lm = tiny_causal_lm("opt").train()
    ids = torch.arange(3, 13)[None]
    noisy = [causal_lm(ids, use_cache=False).logits for _ in range(2)]
    assert not torch.equal(*noisy)
    disable_dropout(causal_lm)
    calm = [causal_lm(ids, use_cache=False).logits for _ in range(2)]
    assert torch.equal(*calm)
    assert torch.equal(calm[0], causal_lm.eval()(ids, use_cache=False).logits)


def test_a_head_that_is_not_understood_is_found_and_stock_logits_are_right():
    model, batch = tiny_hybrid("gemma2"), lay_out(random_items(seed=2), "shared_prefix")
    use_layout(model, "shared_prefix")
    expected = model(batch).logprob.detach()
    model.response_logprobs.transform = HeadTransform(scale=3.0)
    assert lm_head_difference(model, model, batch) > 0.1
    model.uses_stock_logits = True
    torch.testing.assert_close(model(batch).logprob.detach(), expected, rtol=1e-5, atol=1e-5)
    model.uses_stock_logits = False
    model.response_logprobs.transform = HeadTransform(softcap=30.0)
    assert lm_head_difference(model, model, batch) < 1e-5


def test_a_model_that_does_not_keep_packed_answers_apart_is_found():
    """A state-space layer takes every registered attention, uses none and runs on from one answer into the next."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=120, hidden_size=32, num_hidden_layers=2, state_size=8)
    mamba = transformers.MambaForCausalLM(config)
    mamba._supports_attention_backend = True  # as hybrids of attention and state-space layers say
    head = make_reward_head(32, bias=False, init="normal", dtype=torch.float32, seed=0)
    leaking, sound = HybridModel(mamba, head), tiny_hybrid("gemma2")
    for model in (leaking, sound):
        use_layout(model, "packed")
    items = random_items(seed=3)
    assert layout_difference(leaking, leaking, items, "packed", with_logprob=True) > 10 * tolerance_of(leaking)
    assert layout_difference(sound, sound, items, "packed", with_logprob=True) < tolerance_of(sound)
    assert sound.causal_lm.config._attn_implementation == "hafrm_segmented"


@pytest.mark.parametrize("window", [16, 128])
def test_a_window_that_only_the_mask_holds_is_refused_or_holds_everything(window):
    """Qwen2-MoE's layers do not pass their window on. One of as many tokens as the model knows positions hides none."""
    model = tiny_hybrid("qwen2-moe", sliding_window=window)
    use_layout(model, "shared_prefix")
    for lengths in ((2,), (30,)):  # a window must not be found by long sequences alone
        items = random_items(seed=3, num_items=2, prompt_lengths=lengths, response_lengths=lengths)
        if window == 16:
            with pytest.raises(UnsupportedAttention, match="Qwen2MoeAttention is sliding_attention"):
                layout_difference(model, model, items, "shared_prefix", with_logprob=True)
        else:
            assert layout_difference(model, model, items, "shared_prefix", with_logprob=True) < tolerance_of(model)


def test_a_comparison_that_fails_leaves_the_attention_as_it_was():
    model = tiny_hybrid("llama")
    use_layout(model, "packed")

    def fails_when_padded(batch, **heads):
        if batch.segments is None:
            raise ModelError("no room")
        return model(batch, **heads)

    with pytest.raises(ModelError, match="no room"):
        layout_difference(model, fails_when_padded, random_items(seed=3), "packed", with_logprob=True)
    assert model.causal_lm.config._attn_implementation == "hafrm_segmented"


def test_reward_head_is_the_same_on_every_rank_and_has_the_stated_spread():
    first = make_reward_head(4096, bias=True, init="normal", dtype=torch.float32, seed=7)
    torch.manual_seed(12345)  # ranks may differ in their global state
    second = make_reward_head(4096, bias=True, init="normal", dtype=torch.float32, seed=7)
    assert torch.equal(first.weight, second.weight)
    assert abs(first.weight.std().item() * 4097**0.5 - 1) < 0.05
    assert not first.bias.any()
    assert not make_reward_head(64, bias=False, init="zero", dtype=torch.float32, seed=7).weight.any()


def test_rewards_are_fp32_in_a_bfloat16_model():
    """bf16 steps at a score of 16 are 0.125: two answers would tie."""
    model = tiny_hybrid("llama").bfloat16()
    use_layout(model, "shared_prefix")
    scores = model(lay_out(random_items(seed=4), "shared_prefix"))
    assert scores.reward.dtype == scores.logprob.dtype == torch.float32
    assert (scores.reward.bfloat16().float() != scores.reward).any()


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("head", ["reward", "logprob"])
def test_an_idle_head_is_not_read_and_gets_the_gradient_0(family, head):
    """phi's LM head has a bias."""
    model, items = tiny_hybrid(family), random_items(3)
    use_layout(model, "shared_prefix")
    asked = {"with_reward": head == "reward", "with_logprob": head == "logprob"}
    batch = lay_out(items, "shared_prefix")
    scores, alone = model(batch, **asked, idle_heads=True), model(batch, **asked)
    assert (scores.reward is None, scores.logprob is None) == (head != "reward", head != "logprob")
    assert torch.equal(getattr(scores, head), getattr(alone, head))
    getattr(scores, head).sum().backward()
    idle = model.lm_head if head == "reward" else model.reward_head
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in idle.parameters())


def test_a_head_of_attributes_reads_where_the_reward_is_read_and_changes_nothing_else():
    plain, items = tiny_hybrid("llama").bfloat16(), random_items(3)
    use_layout(plain, "shared_prefix")
    batch = lay_out(items, "shared_prefix")
    assert not any("attribute" in name for name in plain.state_dict())
    assert make_attribute_head(32, [], torch.float32) is None
    head = make_attribute_head(32, ["x", "y", "z"], torch.bfloat16)
    model = HybridModel(plain.causal_lm, plain.reward_head, head)
    model.use_layout("shared_prefix", "auto", torch.device("cpu"))
    before, start = plain(batch), model(batch)
    assert start.attributes.shape == (batch.num_responses, 3) and not start.attributes.any()
    with torch.no_grad():
        head.weight[1].copy_(model.reward_head.weight[0])
        head.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
    scores = model(batch)
    for name in ("reward", "logprob", "token_logprobs"):
        assert torch.equal(scores.of(name), before.of(name))
    assert scores.attributes.dtype == torch.float32
    torch.testing.assert_close(scores.attributes[:, 1], scores.reward - 1)
    assert (scores.attributes[:, [0, 2]] == torch.tensor([0.5, 2.0])).all()
    assert model(batch, with_reward=False).attributes is None
    model(batch, with_reward=False, idle_heads=True).logprob.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())
    assert not {*head.parameters()} & {*model.shared_parameters()}
