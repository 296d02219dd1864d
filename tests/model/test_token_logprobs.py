"""Log-probs of given tokens and their gradients, against a naive version in fp64."""

import pytest
import torch

from hafrm_ds.model import token_logprobs as module
from hafrm_ds.model.token_logprobs import HeadTransform, TiledSoftmax, blocks, token_logprobs

TRANSFORMS = [HeadTransform(), HeadTransform(scale=0.25), HeadTransform(softcap=5.0), HeadTransform(0.5, 3.0)]


SOFTMAXES = {
    "whole rows": TiledSoftmax(tile_bytes=4 * 31 * 2, whole_rows=True),
    "columns": TiledSoftmax(tile_bytes=4 * 8 * 3, whole_rows=False),
    "of the device": None,
}


def naive(hidden, weight, bias, targets, transform):
    logits = transform.scale * (hidden @ weight.t() + (0 if bias is None else bias))
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits.log_softmax(-1)[torch.arange(len(targets)), targets]


def inputs(dtype=torch.float64, num_tokens=13, hidden_size=8, vocabulary=31):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, hidden_size, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_values_and_gradients_equal_a_naive_version_in_fp64(transform, has_bias, softmax, monkeypatch):
    # Five tokens or eight columns a block, a shorter last one, and tiles that do not divide it.
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 31 * 5)
    monkeypatch.setattr(module, "COLUMNS", 8)
    hidden, weight, bias, targets = inputs()
    bias = bias if has_bias else None
    exact = [tensor.requires_grad_() for tensor in (hidden, weight, bias) if tensor is not None]
    expected = naive(hidden, weight, bias, targets, transform)
    upstream = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    expected_gradients = torch.autograd.grad(expected @ upstream, exact)

    single = [tensor.detach().float().requires_grad_() for tensor in exact]
    actual = token_logprobs(
        single[0], single[1], single[2] if has_bias else None, targets, transform, SOFTMAXES[softmax]
    )
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(actual @ upstream.float(), single)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5)


def test_bfloat16_inputs_give_fp32_log_probs():
    hidden, weight, _, targets = inputs(torch.bfloat16)
    actual = token_logprobs(hidden, weight, None, targets, HeadTransform())
    logits = (hidden @ weight.t()).double()
    expected = logits.log_softmax(-1)[torch.arange(len(targets)), targets]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    assert (actual.bfloat16().float() != actual).any()


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, _, targets = inputs(torch.float32)
    token_logprobs(hidden.requires_grad_(), weight, None, targets, HeadTransform()).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_of_no_token_every_gradient_is_zero(softmax):
    """A head that is idle in a step runs on no position: what it gives its weight must be written all the same."""
    hidden, weight, bias, targets = (tensor[:0] for tensor in inputs(torch.float32))
    _, weight, bias, _ = (tensor.requires_grad_(tensor.is_floating_point()) for tensor in inputs(torch.float32))
    token_logprobs(hidden.requires_grad_(), weight, bias, targets, HeadTransform(), SOFTMAXES[softmax]).sum().backward()
    assert weight.grad.eq(0).all() and bias.grad.eq(0).all()


@pytest.mark.parametrize(("num_tokens", "vocabulary"), [(5_002, 128_256), (5_002, 256_000), (1, 128_256), (10**6, 32)])
@pytest.mark.parametrize("whole_rows", [True, False])
def test_blocks_cover_all_logits_once_within_their_bytes(num_tokens, vocabulary, whole_rows):
    rows, columns = shape = module.block_shape(num_tokens, vocabulary, 2, whole_rows)
    found = list(blocks(num_tokens, vocabulary, shape))
    covered = sum(len(range(num_tokens)[a]) * len(range(vocabulary)[b]) for a, b in found)
    assert covered == num_tokens * vocabulary
    assert 2 * rows * columns <= module.BLOCK_BYTES
    if whole_rows:
        assert columns == vocabulary
    else:
        assert rows >= num_tokens and (columns % module.COLUMNS == 0 or columns == vocabulary)
