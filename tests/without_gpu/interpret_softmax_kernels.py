"""Run by test_softmax_kernels.py under TRITON_INTERPRET=1: log-probs and gradients by the Triton kernels."""

import torch
from torch import Tensor

from hafrm_ds.model import softmax_kernels, token_logprobs
from hafrm_ds.model.softmax_kernels import TritonSoftmax
from hafrm_ds.model.token_logprobs import HeadTransform, Softmax, TiledSoftmax

TRANSFORMS = (HeadTransform(), HeadTransform(0.25), HeadTransform(softcap=5.0), HeadTransform(0.5, 3.0))
TOKENS, HIDDEN, VOCABULARY = 13, 16, 301


def main() -> None:
    # Several blocks, several programs a row, and a last one that is not full.
    token_logprobs.BLOCK_BYTES, token_logprobs.COLUMNS, softmax_kernels.COLUMNS = 2 * TOKENS * 100, 50, 64
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((TOKENS, HIDDEN), (VOCABULARY, HIDDEN), VOCABULARY)]
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    upstream = torch.linspace(-1, 2, TOKENS)

    def run(inputs: list[Tensor], transform: HeadTransform, softmax: Softmax) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        found = token_logprobs.token_logprobs(*leaves, targets, transform, softmax)
        return [found.detach(), *torch.autograd.grad(found @ upstream, leaves)]

    for dtype in (torch.float32, torch.bfloat16):
        inputs = [tensor.to(dtype) for tensor in values]
        for transform in TRANSFORMS:
            ours = run(inputs, transform, TritonSoftmax())
            theirs = run(inputs, transform, TiledSoftmax.on("cuda" if dtype == torch.float32 else "cpu"))
            exact = all_logits([tensor.double() for tensor in inputs], targets, upstream.double(), transform)
            for name, mine, torch_s, true in zip(("log-probs", "hidden", "weight", "bias"), ours, theirs, exact):
                scale = true.abs().max().item()
                error, allowed = ((each - true).abs().max().item() / scale for each in (mine, torch_s))
                # Of its own rounding; the sum for the bias is of gradients in bfloat16.
                limit = 2 * allowed + (2e-6 if dtype == torch.float32 or name == "log-probs" else 4e-3)
                assert error <= limit, f"{dtype} {transform} {name}: off by {error:.2g}, torch's by {allowed:.2g}"
            print(f"{dtype} {transform}: as exact")


def all_logits(inputs: list[Tensor], targets: Tensor, upstream: Tensor, transform: HeadTransform) -> list[Tensor]:
    hidden, weight, bias = leaves = [tensor.requires_grad_() for tensor in inputs]
    logits = transform.scale * torch.nn.functional.linear(hidden, weight, bias)
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    found = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    return [found.detach(), *torch.autograd.grad(found @ upstream, leaves)]


if __name__ == "__main__":
    main()
