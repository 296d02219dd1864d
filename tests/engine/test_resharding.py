"""The files of a checkpoint, read without DeepSpeed's loader."""

import gc
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.utils.tensor_fragment import fragment_address
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hafrm_ds.engine.checkpoint import CheckpointError
from hafrm_ds.engine.resharding import MODEL_FILE, Layout, Shards, read, trained_weights


class Intruder:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_no_code_in_a_pickle_is_run(tmp_path):
    name = "causal_lm.model.norm.weight"
    file = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {name: torch.ones(3)}}, file)
    assert torch.equal(dict(trained_weights(tmp_path, 2, 2))[name], torch.ones(3))
    torch.save({"module": {name: torch.ones(3)}, "more": Intruder(tmp_path / "made")}, file)
    with pytest.raises(CheckpointError, match=r"model_states.pt holds something that DeepSpeed does not write"):
        dict(trained_weights(tmp_path, 2, 2))
    assert not (tmp_path / "made").exists()


class ByName:
    """Is pickled as Python 3.11.0 to 3.11.3 do it with a member of an enum."""

    def __init__(self, kind: type, name: str):
        self.kind, self.name = kind, name

    def __reduce__(self):
        return getattr, (self.kind, self.name)


def test_a_stage_is_read_whichever_python_has_written_it(tmp_path):
    from deepspeed.runtime.zero.config import ZeroStageEnum

    file = tmp_path / "mp_rank_00_model_states.pt"
    for stage in (ZeroStageEnum.weights, ByName(ZeroStageEnum, "weights")):
        torch.save({"module": {}, "stage": stage}, file)
        assert read(file)["stage"] == 3
    torch.save({"module": {}, "stage": ByName(Path, "touch")}, file)
    with pytest.raises(CheckpointError, match="DeepSpeed does not write"):
        read(file)


SHAPES = [{"matrix": (7, 5), "vector": (3,)}, {"head": (1,)}]
"""Two groups; a part of one number, which lies on the first rank alone."""


def whole(name: str, key: str) -> Tensor:
    """What the made checkpoints hold of a parameter: other numbers for each."""
    shape = {name: shape for group in SHAPES for name, shape in group.items()}[name]
    seed = sum(map(ord, name + key))
    return torch.rand(torch.Size(shape).numel(), generator=torch.Generator().manual_seed(seed))


def padded(values: Tensor, numel: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, numel - len(values)))


def write_stage_3(folder: Path, world_size: int) -> None:
    """The files of stage 3, with what is read of them."""
    for rank in range(world_size):
        flat: dict[str, list[Tensor]] = {key: [] for key in ("fp32", "exp_avg", "exp_avg_sq")}
        for key, groups in flat.items():
            for shapes in SHAPES:
                shares = []
                for name in shapes:
                    share = -(-len(whole(name, key)) // world_size)
                    shares.append(padded(whole(name, key)[rank * share : (rank + 1) * share], share))
                groups.append(torch.cat(shares))
        state = {
            group: {"step": torch.tensor(4.0), "exp_avg": average, "exp_avg_sq": square}
            for group, (average, square) in enumerate(zip(flat["exp_avg"], flat["exp_avg_sq"]))
        }
        saved = {"fp32_flat_groups": flat["fp32"], "optimizer_state_dict": {"state": state}}
        shapes = [{name: torch.Size(shape) for name, shape in group.items()} for group in SHAPES]
        prefix = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": saved}, folder / f"{prefix}_optim_states.pt")
        torch.save({"param_shapes": shapes}, folder / f"{prefix}_model_states.pt")


@pytest.mark.parametrize(("before", "after"), [(2, 8), (3, 2), (8, 3), (1, 4)])
def test_ranks_read_their_shares_of_every_parameter_and_nothing_else(tmp_path, before, after):
    write_stage_3(tmp_path, before)
    for name in ("matrix", "vector", "head"):
        for key in ("fp32", "exp_avg", "exp_avg_sq"):
            share = -(-len(whole(name, key)) // after)
            parts = []
            for rank in range(after):
                shards = Shards(tmp_path, 3, before)
                part = torch.zeros(share)
                shards.copy_into(part, name, key, rank * share)
                parts.append(part)
                overlap = -(-before // after) + 1  # old shares that a new one can lie in
                assert shards.saved.cache_info().currsize <= overlap
                assert all(shards.flat(rank, 0)[key].offset for rank in range(before)), "not read by its place"
            assert torch.equal(torch.cat(parts), padded(whole(name, key), share * after))
            assert Shards(tmp_path, 3, before).step(name) == 4
    assert all(torch.equal(values, whole(name, "fp32")) for name, values in trained_weights(tmp_path, 3, before))


def test_shards_whose_places_deepspeed_notes_wrongly_are_refused(tmp_path):
    """Under round_robin_gradients: what it notes is the order of the parameters without it."""
    noted = [{"first": fragment_address(numel=3, start=0), "second": fragment_address(numel=2, start=3)}]
    saved = {"optimizer_state_dict": {"param_slice_mappings": noted}}
    torch.save(saved, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    shapes = {"first": torch.Size([3]), "second": torch.Size([2])}
    torch.save({"param_shapes": [shapes]}, tmp_path / MODEL_FILE)
    assert Shards(tmp_path, 2, 1).layout.numel("second") == 2
    torch.save({"param_shapes": [dict(reversed(shapes.items()))]}, tmp_path / MODEL_FILE)
    with pytest.raises(CheckpointError, match="round_robin_gradients DeepSpeed notes wrong places"):
        Shards(tmp_path, 2, 1)


def test_no_file_stays_mapped_once_the_shards_are_left(tmp_path):
    """Without a garbage collection: on NFS a folder with a mapped file cannot be deleted."""
    write_stage_3(tmp_path, 2)
    gc.disable()
    try:
        shards = Shards(tmp_path, 3, 2)
        assert shards.step("matrix") == 4
        assert str(tmp_path) in Path("/proc/self/maps").read_text()
        del shards
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()


@settings(deadline=None)
@given(numel=st.integers(1, 60), before=st.integers(1, 9), start=st.integers(0, 70), wanted=st.integers(1, 70))
def test_parts_are_what_is_asked_for(numel, before, start, wanted):
    layout = Layout.of_stage_3([{"other": (5,), "asked": (numel,)}], before)
    share, first = -(-numel // before), -(-5 // before)
    found = []
    for place, part in layout.parts("asked", start, wanted):
        assert place == len(found)
        found += range(part.rank * share + part.start - first, part.rank * share + part.start - first + part.numel)
    assert found == [*range(min(start, numel), min(start + wanted, numel))]
    assert layout.numel("asked") == numel


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 30), min_size=0, max_size=6), start=st.integers(0, 20), wanted=st.integers(1, 20))
def test_parts_of_parameters_laid_end_to_end(cuts, start, wanted):
    """Of two parameters of 12 and 18 numbers, on ranks that begin at any of these."""
    edges = [0, *sorted(cuts), 30]
    ranks = []
    for first, last in pairwise(edges):
        addresses = {}
        for name, begin, end in (("one", 0, 12), ("other", 12, 30)):
            own = SimpleNamespace(start=max(first, begin) - first, numel=min(last, end) - max(first, begin))
            if own.numel > 0:
                addresses[name] = own
        ranks.append([addresses])
    layout = Layout.of_stages_1_and_2(ranks)
    for name, begin, end in (("one", 0, 12), ("other", 12, 30)):
        found = []
        for place, part in layout.parts(name, start, wanted):
            assert place == len(found)
            found += range(edges[part.rank] + part.start, edges[part.rank] + part.start + part.numel)
        assert found == [*range(begin + start, min(begin + start + wanted, end))]
