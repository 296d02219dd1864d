"""Run by test_fused_layers.py under TRITON_INTERPRET=1: scores and gradients of every family with Liger's functions."""

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.runtime import interpreter

from hafrm_ds.data.packing import lay_out
from hafrm_ds.errors import ModelError
from hafrm_ds.model.hybrid import HybridModel
from hafrm_ds.model.recomputation import set_gradient_checkpointing
from tests.tiny_models import FAMILIES, pair_losses, random_items, tiny_hybrid, use_layout

ITEMS = random_items(seed=3, num_items=1, prompt_lengths=(5,), response_lengths=(3, 4))
LAYOUTS = {"gpt-oss": "padded", "granite": "padded"}
"""The first knows no other, and with the second two rows are rotated."""
CPU = torch.device("cpu")
EXACT, ROUNDING = 2e-6, 1.5
"""In fp32, relative to the largest value. In bfloat16, times the error of transformers' own functions, whose roundings
are others: both against fp32."""


def mend_interpreter() -> None:
    """Let it compute as GPUs do. It lacks the functions of CUDA's library, hands Python's floats to a kernel as they
    are, not as scalars in fp32, drops bits of what becomes bfloat16 instead of rounding it, and computes with the bits
    of bfloat16 as if they were integers."""
    libdevice.rsqrt, libdevice.tanh = lambda x: tl.rsqrt(x), lambda x: 2 * tl.sigmoid(2 * x) - 1
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    convert, cast, compute = interpreter._implicit_cvt, builder.cast_impl, builder.binary_op

    def convert_float(argument):
        if isinstance(argument, float):
            return tl.tensor(handle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    def rounded(values: np.ndarray) -> interpreter.TensorHandle:
        bits = torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy()
        return handle(bits.view(np.uint16), tl.bfloat16)

    def widened(value: interpreter.TensorHandle) -> np.ndarray:
        bits = torch.from_numpy(np.ascontiguousarray(value.data).view(np.int16))
        return bits.view(torch.bfloat16).float().numpy()

    def rounding_cast(self, value, to):
        match value.dtype.scalar, to.scalar:
            case tl.float32, tl.bfloat16:
                return rounded(value.data)
            case tl.bfloat16, tl.float32:
                return handle(widened(value), tl.float32)
        return cast(self, value, to)

    def rounding_operation(self, left, right, operation):
        if left.dtype.scalar != tl.bfloat16:
            return compute(self, left, right, operation)
        return rounded(operation(widened(left), widened(right)))

    interpreter._implicit_cvt, builder.cast_impl, builder.binary_op = convert_float, rounding_cast, rounding_operation


def model_of(family: str, dtype: torch.dtype, fused: bool) -> HybridModel:
    """One layer, with weights rounded to bfloat16 in either dtype."""
    model = tiny_hybrid(family, num_hidden_layers=1).bfloat16().to(dtype)
    use_layout(model, LAYOUTS.get(family, "shared_prefix"))
    model.use_fused("liger" if fused else "off", CPU)
    return model


def run(model: HybridModel) -> dict[str, Tensor]:
    scores = model(lay_out(ITEMS, model.layout))
    reference = torch.full_like(scores.logprob, -10.0)
    pair_losses(scores.reward, scores.logprob, reference).sum().backward()
    gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return {"scores": torch.cat([scores.reward, scores.logprob]).detach(), "gradients": torch.cat(gradients)}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: ((found[name] - each).norm() / each.norm()).item() for name, each in exact.items()}


def check(family: str) -> str:
    exact = run(model_of(family, torch.float32, fused=False))
    model = model_of(family, torch.float32, fused=True)
    fused = str(model.fused)
    in_fp32 = errors(run(model), exact)
    ours, own = (errors(run(model_of(family, torch.bfloat16, fused)), exact) for fused in (True, False))
    for name in exact:
        assert in_fp32[name] <= EXACT, f"{family} {name} in fp32: off by {in_fp32[name]:.2g}"
        assert ours[name] <= ROUNDING * own[name], (
            f"{family} {name}: off by {ours[name]:.2g}, its own by {own[name]:.2g}"
        )
    return f"{family}: as exact, {in_fp32['gradients']:.1g} in fp32, {fused}"


def check_as_trained(changes: str) -> None:
    """Frozen weights, as adapters leave them, or recomputed layers: the same gradients."""
    found = []
    for fused in (False, True):
        model = model_of("qwen3-tied", torch.float32, fused)
        if changes == "checkpointing":
            set_gradient_checkpointing(model.causal_lm, True)
        else:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("norm" not in name)
        found.append(run(model))
    assert errors(found[1], found[0])["gradients"] <= EXACT


def main() -> None:
    mend_interpreter()  # before Liger is imported
    for family in (*FAMILIES, "qwen3-moe", "gpt-oss"):
        try:
            print(check(family), flush=True)
        except ModelError as error:
            print(f"{family} refused: {error}", flush=True)
    for changes in ("checkpointing", "frozen norms"):
        check_as_trained(changes)
        print(f"{changes}: the same", flush=True)


if __name__ == "__main__":
    main()
