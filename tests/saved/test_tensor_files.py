"""What is written is what is read back, one tensor is open at a time, and what the disk does not hold is noticed."""

from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from hafrm_ds.errors import ModelError
from hafrm_ds.saved import tensor_files
from hafrm_ds.saved.tensor_files import TensorSource, check_file, write_sharded, write_tensors

TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "weight": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)),
    "half": torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "counts": torch.arange(5),
    "nothing": torch.empty(0, 4),
}


def sources() -> dict[str, TensorSource]:
    return {name: TensorSource.of(value) for name, value in TENSORS.items()}


def test_every_dtype_and_shape_is_read_back_by_the_formats_own_library(tmp_path):
    write_tensors(sources(), tmp_path / "all.safetensors")
    found = load_file(tmp_path / "all.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_one_tensor_is_open_at_a_time(tmp_path):
    opened, most = set(), []

    def source_of(name: str) -> TensorSource:
        @contextmanager
        def whole():
            opened.add(name)
            most.append(len(opened))
            yield TENSORS[name]
            opened.remove(name)

        return TensorSource(tuple(TENSORS[name].shape), TENSORS[name].dtype, whole)

    write_tensors({name: source_of(name) for name in TENSORS}, tmp_path / "all.safetensors")
    assert most == [1] * len(TENSORS)


def test_a_tensor_that_is_not_whole_is_an_error(tmp_path):
    """As an ungathered parameter under ZeRO-3: no elements."""
    source = TensorSource.of(TENSORS["weight"])
    broken = TensorSource(source.shape, source.dtype, TensorSource.of(torch.empty(0)).open)
    with pytest.raises(RuntimeError, match=r"weight has the shape \(0,\) instead of \(5, 7\).*not gathered"):
        write_tensors({"weight": broken}, tmp_path / "all.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "flags reads back otherwise"),
        (lambda content: content[:-3], "cannot be read back"),
        (lambda content: content.replace(b'"half"', b'"hall"'), "other tensors than were written: half, hall"),
    ],
)
def test_a_disk_that_loses_something_is_noticed(tmp_path, monkeypatch, change, message):
    file = tmp_path / "all.safetensors"

    def on_a_bad_disk(path, *rest):
        path.write_bytes(change(path.read_bytes()))
        check_file(path, *rest)

    monkeypatch.setattr(tensor_files, "check_file", on_a_bad_disk)
    with pytest.raises(ModelError, match=message):
        write_tensors(sources(), file)


def test_a_shard_holds_what_fits_and_a_larger_tensor_has_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(tensor_files, "MAX_SHARD_BYTES", 10)
    sizes = {"a": 4, "b": 6, "c": 1, "d": 25, "e": 3}
    write_sharded(
        {name: TensorSource.of(torch.zeros(size, dtype=torch.uint8)) for name, size in sizes.items()}, tmp_path
    )
    files = [load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert {name: len(tensor) for file in files for name, tensor in file.items()} == sizes
    assert all(len(file) == 1 or sum(map(len, file.values())) <= 10 for file in files)


def test_parameters_that_are_views_of_one_buffer_are_written(tmp_path):
    """As under ZeRO 1 and 2."""
    flat = torch.arange(10.0)
    write_tensors({"a": TensorSource.of(flat[:4]), "b": TensorSource.of(flat[4:])}, tmp_path / "all.safetensors")
    assert load_file(tmp_path / "all.safetensors")["b"].tolist() == [4.0, 5.0, 6.0, 7.0, 8.0, 9.0]


def test_a_full_disk_is_said(tmp_path):
    (tmp_path / "all.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"all.safetensors cannot be written: "):
        write_tensors(sources(), tmp_path / "all.safetensors")
