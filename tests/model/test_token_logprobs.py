import pytest
import torch

from hafrm_ds.model import token_logprobs as module
from hafrm_ds.model.token_logprobs import HeadTransform, token_logprobs

TRANSFORMS = [HeadTransform(), HeadTransform(scale=0.25), HeadTransform(softcap=5.0), HeadTransform(0.5, 3.0)]


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
def test_values_and_gradients_equal_a_naive_version_in_fp64(transform, has_bias, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 31 * 5)  # five tokens a chunk, and a shorter last one
    hidden, weight, bias, targets = inputs()
    bias = bias if has_bias else None
    exact = [tensor.requires_grad_() for tensor in (hidden, weight, bias) if tensor is not None]
    expected = naive(hidden, weight, bias, targets, transform)
    upstream = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    expected_gradients = torch.autograd.grad(expected @ upstream, exact)

    single = [tensor.detach().float().requires_grad_() for tensor in exact]
    actual = token_logprobs(single[0], single[1], single[2] if has_bias else None, targets, transform)
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
