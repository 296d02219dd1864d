"""The fused log-probs in bfloat16 against fp64, and the memory they take; Liger's beside them where it is installed."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hafrm_ds.hardware.measurement import peak_growth_bytes
from hafrm_ds.model.attention import import_problem
from hafrm_ds.model.token_logprobs import BLOCK_BYTES, TILE_BYTES, HeadTransform, token_logprobs
from tests.gpu.environment import DEVICE, IS_GPU
from tests.gpu.liger import IS_AVAILABLE, liger_logprobs

pytestmark = pytest.mark.gpu

TRANSFORMS = {
    "plain": HeadTransform(),
    "scale": HeadTransform(scale=0.25),
    "softcap": HeadTransform(softcap=3.0),
}


def triton_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: HeadTransform
) -> Tensor:
    """As `token_logprobs`, under model.log_probs triton."""
    from hafrm_ds.model.softmax_kernels import TritonSoftmax

    return token_logprobs(hidden, weight, bias, targets, transform, TritonSoftmax())


ERROR_FACTORS = {token_logprobs: 2, triton_logprobs: 2, liger_logprobs: 4}
"""Times the error with kept logits. Liger rounds the gradient of the logits twice."""


def inputs(num_tokens: int, hidden_size: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and targets: logits with a standard deviation of about 2."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE)

    weight = 2 * hidden_size**-0.5 * normal(vocabulary, hidden_size)
    hidden, bias = normal(num_tokens, hidden_size), normal(vocabulary)
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator, device=DEVICE)
    return hidden.bfloat16(), weight.bfloat16(), bias.bfloat16(), targets


def with_gradients(function: Callable[..., Tensor], tensors: list[Tensor], targets: Tensor, *rest) -> list[Tensor]:
    """Log-probs of `function`(hidden, weight, bias, targets, transform) and gradients of the tensors, fp64."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    hidden, weight, *bias = tensors
    logprobs = function(hidden, weight, bias[0] if bias else None, targets, *rest)
    upstream = torch.linspace(-1, 2, len(targets), device=DEVICE, dtype=logprobs.dtype)
    gradients = torch.autograd.grad(logprobs @ upstream, tensors)
    return [tensor.detach().double() for tensor in (logprobs, *gradients)]


def kept_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: HeadTransform
) -> Tensor:
    """As `token_logprobs`, by all logits at once, in the dtype that is given; the softmax in fp32 at least."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("function", ERROR_FACTORS)
def test_values_and_gradients_are_as_exact_as_with_kept_logits(function, transform, has_bias):
    if function is liger_logprobs and not (IS_AVAILABLE and transform != "scale"):
        pytest.skip("Liger needs a GPU and liger_kernel, and knows no scale")
    if function is triton_logprobs and not (IS_GPU and import_problem("triton") is None):
        pytest.skip("needs a GPU; tests/without_gpu/test_softmax_kernels.py has it on the CPU")
    hidden, weight, bias, targets = inputs(4_096 if IS_GPU else 80, 64, 32_768)
    tensors = [hidden, weight, bias] if has_bias else [hidden, weight]
    transform = TRANSFORMS[transform]
    exact = with_gradients(kept_logits, [tensor.double() for tensor in tensors], targets, transform)
    yardstick = with_gradients(kept_logits, tensors, targets, transform)
    actual = with_gradients(function, tensors, targets, transform)
    for name, ours, kept, expected in zip(("logprob", "hidden", "weight", "bias"), actual, yardstick, exact):
        eps = torch.finfo(torch.float32 if name == "logprob" else torch.bfloat16).eps
        rounding = eps / 2 * expected.abs().max().item()
        allowed = ERROR_FACTORS[function] * (kept - expected).abs().max().item() + rounding
        error = (ours - expected).abs().max().item()
        assert error <= allowed, f"{name}: off by {error:.3g}, allowed are {allowed:.3g}"


@pytest.mark.slow  # on a CPU
def test_memory_is_that_of_a_block_and_a_few_tiles():
    """16k tokens with the logits of a vocabulary of 128k would take 8 GiB in fp32, and their gradient as much."""
    num_tokens, vocabulary = 16_384 if IS_GPU else 4_096, 131_072
    hidden, weight, _, targets = inputs(num_tokens, 64, vocabulary)
    hidden.requires_grad_()
    weight.requires_grad_()

    def work() -> None:
        token_logprobs(hidden, weight, None, targets, HeadTransform()).sum().backward()

    work()  # the gradients and the workspaces of matrix products stay
    bound = BLOCK_BYTES + 3 * TILE_BYTES[DEVICE.type] + 2 * weight.nbytes
    assert 4 * num_tokens * vocabulary > 2 * bound
    assert peak_growth_bytes(DEVICE, work) < bound
