"""A CUDA device that computes nothing: shapes, dtypes and devices are followed; what a host waits for is refused."""

import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hafrm_ds.model.hybrid import HybridModel, RewardHead, disable_dropout
from tests.tiny_models import FAMILIES, SHAPE

DEVICE = torch.device("cuda", 0)
READ_BY_THE_HOST = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select")
"""Operations whose result decides what the host does next, so that it waits for the device."""
ROOT = Path(__file__).parents[2]
MODELS = Path(transformers.__file__).parent


class HostWaits(AssertionError):
    """Something in a forward makes the host wait for the device, or mixes devices."""


def place() -> str:
    """File and line of the innermost call that is ours or a model's."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        is_ours = path.is_relative_to(ROOT) and "site-packages" not in path.parts
        if path != Path(__file__) and (is_ours or path.is_relative_to(MODELS)):
            name = path.relative_to(ROOT) if is_ours else Path("transformers") / path.relative_to(MODELS)
            return f"{name}:{frame.lineno}: {frame.line}"
    return "?"


class NoDataDependence(TorchDispatchMode):
    """Refuses operations whose result the host reads, on any device.

    allowed: parts of a `place` where they are known.
    """

    def __init__(self, allowed: tuple[str, ...] = ()):
        super().__init__()
        self.allowed = allowed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in READ_BY_THE_HOST:
            where = place()
            if not any(each in where for each in self.allowed):
                raise HostWaits(f"{where}\n  the host reads what the device has computed ({func})")
        return func(*args, **kwargs or {})


class AsOnCuda(TorchDispatchMode):
    """Refuses what the host would wait for on a GPU, and names the place of it and of a mix of devices.

    Attributes:
        to_device, to_host: copies that it does not wait for.
    """

    def __init__(self):
        super().__init__()
        self.to_device = self.to_host = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in READ_BY_THE_HOST and args[0].device.type == "cuda":
            raise HostWaits(f"{place()}\n  the host reads what the device has computed ({func})")
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            to = kwargs.get("device") if name == "_to_copy" else args[0].device
            is_async = kwargs.get("non_blocking") if name == "_to_copy" else args[2:] == (True,)
            if to is not None and torch.device(to).type != source.device.type:
                if source.device.type == "cuda":
                    if not is_async:
                        raise HostWaits(f"{place()}\n  a copy from the device, which the host waits for")
                    self.to_host += 1
                elif not is_async or not getattr(source, "is_pinned_here", False):
                    raise HostWaits(f"{place()}\n  a blocking copy to the device: not pinned, or not non_blocking")
                else:
                    self.to_device += 1
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "device" not in str(error).lower():
                raise
            raise HostWaits(f"{place()}\n  {str(error).splitlines()[0]}") from error


def pinned(tensor: Tensor) -> Tensor:
    result = tensor.clone()
    result.is_pinned_here = True
    return result


@cache
def let_fake_tensors_be_indexed() -> None:
    """torch without CUDA refuses to index a tensor that says it is on CUDA; a guard that does nothing lets it (seconds,
    once a process). Skips where there is no compiler."""
    if torch.version.cuda is not None:
        return
    if (compiler := shutil.which("g++") or shutil.which("c++")) is None:
        pytest.skip("needs a C++ compiler, as torch is built without CUDA")
    folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as temporary:
        library = Path(temporary) / "cuda_guard.so"
        command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{folder / 'include'}"]
        command += [str(Path(__file__).with_name("cuda_guard.cpp")), f"-L{folder / 'lib'}", "-lc10", "-o", str(library)]
        subprocess.run(command, check=True)
        torch.ops.load_library(library)


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Inside, tensors are fake, and kernels find a GPU of compute capability 9.0."""
    let_fake_tensors_be_indexed()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def fake_hybrid(family: str, dtype: torch.dtype = torch.bfloat16) -> HybridModel:
    """A tiny model on the fake device. Call it inside `fake_cuda`."""
    class_name, changes = FAMILIES[family]
    config = getattr(transformers, class_name)(**{"tie_word_embeddings": False, **SHAPE, **changes})
    with DEVICE:
        causal_lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    disable_dropout(causal_lm)
    head = RewardHead(config.hidden_size, 1, bias=False, device=DEVICE, dtype=dtype)
    return HybridModel(causal_lm.train(), head)
