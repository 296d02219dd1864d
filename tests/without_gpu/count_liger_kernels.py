"""Run by test_fused_layers.py: what Liger's functions start and keep, beside what is supposed of them."""

import torch
import triton
from liger_kernel import ops
from torch import Tensor

from hafrm_ds.capacity.working_memory import META, TRACED_OPS
from tests.without_gpu.counting import LIGER_KERNELS, Counting, bytes_of

TOKENS, HEADS, DIMENSIONS, WIDTH = 32, 4, 8, 64


def tensor(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=META, requires_grad=True)


def heads() -> Tensor:
    return tensor(1, TOKENS, HEADS, DIMENSIONS).transpose(1, 2)


def arguments(name: str) -> list:
    if name == "LigerRMSNormFunction":
        return [tensor(1, TOKENS, WIDTH), tensor(WIDTH), 1e-6, 0.0, "llama", False, None]
    if name == "LigerRopeFunction":
        angles = [torch.empty(1, TOKENS, DIMENSIONS, dtype=torch.bfloat16, device=META) for _ in range(2)]
        return [heads(), heads(), *angles]
    return [tensor(1, TOKENS, WIDTH), tensor(1, TOKENS, WIDTH)]


def kept(function, inputs: list) -> int:
    """Bytes that are kept for backward."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function.apply(*inputs)
    return bytes_of(found)


def main() -> None:
    started: list[str] = []
    # A kernel is started by indexing it with its grid; nothing runs on the meta device.
    triton.runtime.jit.JITFunction.run = lambda self, *arguments, **options: started.append(self.fn.__name__)
    for name, traced in vars(TRACED_OPS).items():
        real, inputs, counts = getattr(ops, name), arguments(name), []
        assert kept(real, inputs) == kept(traced, inputs), name
        started.clear()
        with Counting() as forward:
            outputs = real.apply(*inputs)
        counts.append(forward.counts.kernels.total() + len(started))
        started.clear()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [torch.empty_like(output) for output in outputs]
        differentiable = [each for each in inputs if isinstance(each, Tensor) and each.requires_grad]
        with Counting() as backward:
            torch.autograd.grad(outputs, differentiable, grads)
        counts.append(backward.counts.kernels.total() + len(started))
        assert tuple(counts) == LIGER_KERNELS[traced.__name__], (
            f"{name}: {counts}, {forward.counts.kernels}, {backward.counts.kernels}"
        )
        print(f"{name}: {counts[0]} and {counts[1]} kernels, as supposed")


if __name__ == "__main__":
    main()
