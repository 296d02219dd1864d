"""Run by test_softmax_kernels.py: compiles the Triton kernels of the log-probs for GPUs that need not be there."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hafrm_ds.model.softmax_kernels import COLUMNS, WARPS, fold_kernel, gradient_kernel

TYPES = {
    **{name: "i32" for name in ("stride", "width", "first")},
    **{name: "fp32" for name in ("scale", "softcap")},
    **{name: "constexpr" for name in ("HAS_SOFTCAP", "COLUMNS")},
    "targets": "*i64",
}
"""Of the arguments that are not pointers to fp32."""
ALIGNED = ("block", "stride", "width")
"""Multiples of 16, as blocks of a whole number of 256 columns are; Triton finds that at run time."""


def main() -> None:
    for capability in (80, 90, 100):
        for kernel in (fold_kernel, gradient_kernel):
            for has_softcap in (False, True):
                for dtype in ("bf16", "fp32"):
                    names = kernel.arg_names
                    source = ASTSource(
                        fn=kernel,
                        signature={name: TYPES.get(name, "*fp32") for name in names} | {"block": f"*{dtype}"},
                        constexprs={"HAS_SOFTCAP": has_softcap, "COLUMNS": COLUMNS},
                        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED},
                    )
                    compiled = triton.compile(
                        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS}
                    )
                    text = compiled.asm["ptx"]
                    assert compiled.asm["cubin"]
                    assert ".v4.b32" in text, f"{kernel.fn.__name__} reads single logits"
                    assert ".local" not in text, f"{kernel.fn.__name__} spills registers"
                    print(f"compiled {kernel.fn.__name__} {dtype} {has_softcap} for sm_{capability}")


if __name__ == "__main__":
    main()
