"""The forward, the joint loss of the loop and the scoring of the reference pass on a CUDA device that computes nothing:
no mix of devices, nothing that a host would wait for, no blocking copy. The backward cannot run so (test_meta.py)."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from hafrm_ds.config import TrainConfig
from hafrm_ds.data.lengths import GroupLengths
from hafrm_ds.data.micro_batches import MicroBatch, make_micro_batch
from hafrm_ds.data.packing import PackedBatch, lay_out
from hafrm_ds.data.pairs import OF_A_PAIR
from hafrm_ds.data.tokenization import TokenizedGroup
from hafrm_ds.engine import scoring
from hafrm_ds.hardware.flops import ForwardCost
from hafrm_ds.model import attention, hybrid
from hafrm_ds.model.recomputation import set_gradient_checkpointing
from hafrm_ds.objective import weights_at
from hafrm_ds.training import loop
from hafrm_ds.training.loop import StepTotals, Trainer
from tests.tiny_models import FAMILIES, pair_losses, random_items
from tests.without_gpu.fake_cuda import DEVICE, AsOnCuda, HostWaits, fake_cuda, fake_hybrid

ITEMS = random_items(seed=3, num_items=6)
MOST_COPIES = 1
"""To the device, for a micro-batch with all that belongs to it."""
SETTINGS = [
    ("shared_prefix", "varlen"),
    ("shared_prefix", "segmented"),
    ("packed", "varlen"),
    ("packed", "segmented"),
    ("padded", "auto"),
]


def use(model: hybrid.HybridModel, layout: str, kernel: str) -> None:
    """Skips what a kernel refuses; a refusal is no fault."""
    config = model.causal_lm.config.get_text_config()
    if layout != "padded" and (reason := attention.KERNELS[kernel].obstacle(DEVICE, torch.bfloat16, config)):
        pytest.skip(f"{kernel}: {reason}")
    model.use_layout(layout, kernel, DEVICE)


@pytest.mark.parametrize(("layout", "kernel"), SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward(monkeypatch, family, layout, kernel):
    batch = lay_out(ITEMS, layout)
    with fake_cuda(monkeypatch):
        model = fake_hybrid(family)
        use(model, layout, kernel)
        with AsOnCuda():
            scores = model(batch.to(DEVICE))
            loss = pair_losses(scores.reward)
    assert (loss.device, scores.logprob.device, scores.reward.dtype) == (DEVICE, DEVICE, torch.float32)
    assert scores.logprob.shape == (2 * len(ITEMS),)


@pytest.mark.parametrize("kind", [True, "selective"])
@pytest.mark.parametrize("kernel", ["varlen", "segmented"])
def test_forward_with_gradient_checkpointing(monkeypatch, kernel, kind):
    batch = lay_out(ITEMS, "shared_prefix")
    with fake_cuda(monkeypatch):
        model = fake_hybrid("llama")
        set_gradient_checkpointing(model.causal_lm, kind)
        use(model, "shared_prefix", kernel)
        with AsOnCuda():
            assert model(batch.to(DEVICE)).reward.device == DEVICE


def micro_batch_of(layout: str) -> MicroBatch:
    pairs = [
        TokenizedGroup(list(item.prompt), tuple(map(list, item.responses)), OF_A_PAIR, source="", id=str(number))
        for number, item in enumerate(ITEMS)
    ]
    return make_micro_batch(pairs, [0, 1, 2, -1, 4], layout, torch.zeros(10))


class FakeEngine:
    """What the loop asks of an engine."""

    def __init__(self, model: hybrid.HybridModel):
        self.model, self.device = model, DEVICE

    def __call__(self, batch: PackedBatch, **how):
        return self.model(batch.to(self.device), **how)


def joint_loss(monkeypatch: pytest.MonkeyPatch, layout: str = "shared_prefix", kernel: str = "varlen"):
    """The loop's own, with its sums, and the copies of the micro-batch."""
    config = TrainConfig.model_validate(
        {"output_dir": "unused", "model": {"name_or_path": "unused"}, "data": {"train": "unused.jsonl"}}
    )
    with fake_cuda(monkeypatch):
        model = fake_hybrid("llama")
        use(model, layout, kernel)
        trainer = SimpleNamespace(
            config=config,
            engine=FakeEngine(model),
            world_size=2,
            rank=1,
            cost=ForwardCost(1.0, 1.0, 1.0, 1.0, 1.0),
            counts_experts=False,
            saver=SimpleNamespace(votes=lambda: [0.0, 0.0], hear=lambda votes: None),
        )
        totals = StepTotals(weight=5.0)
        with AsOnCuda() as copies:
            micro_batch = micro_batch_of(layout).to(DEVICE)
            loss = Trainer.joint_loss(trainer, weights_at(config.objective, 0), micro_batch, 5.0, totals)
    return loss, totals, copies, trainer


@pytest.mark.parametrize(("layout", "kernel"), SETTINGS)
def test_joint_loss_of_the_loop(monkeypatch, layout, kernel):
    loss, totals, copies, _ = joint_loss(monkeypatch, layout, kernel)
    assert (loss.device, loss.shape) == (DEVICE, ())
    assert {each.device for each in totals.sums.values()} == {DEVICE}
    assert (copies.to_device, copies.to_host) == (MOST_COPIES, 0)
    assert totals.tokens > 0 < totals.flops


def test_a_step_talks_once_to_the_other_ranks_and_once_to_the_host(monkeypatch):
    _, totals, _, trainer = joint_loss(monkeypatch)
    said: list[str] = []

    def tolist(row: torch.Tensor) -> list[float]:
        said.append("to the host")
        return [0.0] * row.numel()

    monkeypatch.setattr(FakeTensor, "tolist", tolist)
    monkeypatch.setattr(loop.dist, "all_reduce", lambda row: said.append("to the ranks"))
    monkeypatch.setattr(loop, "peak_memory_bytes", lambda device: 1)
    with fake_cuda(monkeypatch), AsOnCuda() as copies:
        metrics = Trainer.reduce(trainer, totals)
    assert said == ["to the ranks", "to the host"]
    assert (copies.to_device, copies.to_host) == (1, 0), "what the host has counted; the row is read by tolist"
    assert metrics.keys() >= {"loss/total", "tokens", "memory_gib"}


@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
def test_scoring_of_the_reference_pass(monkeypatch, layout):
    columns = zip(*([len(item.prompt), *map(len, item.responses)] for item in ITEMS), strict=True)
    lengths = GroupLengths.of_pairs(*map(np.array, columns))
    kept: list[tuple] = []
    # Values are copied behind what computes them, and waited for when the next micro-batch has been launched.
    monkeypatch.setattr(scoring, "in_order", lambda scored, sizes, ranks_on: scored)
    events: list[str] = []

    class Event:
        def record(self, stream) -> None:
            events.append("copied")

        def synchronize(self) -> None:
            events.append("waited for")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    with fake_cuda(monkeypatch):
        model = fake_hybrid("llama")
        use(model, layout, "varlen")
        with AsOnCuda() as copies:
            scored = scoring.score_items(
                FakeEngine(model),
                scoring.Items(lambda position: ITEMS[position], np.full(len(ITEMS), 2), lengths.costs(layout)),
                ("logprob",),
                layout=layout,
                max_tokens=45,
                on_values=lambda positions, values: kept.append((positions, values)),
            )
    assert kept == scored  # each told once, in the order of the micro-batches
    assert sorted(position for positions, _ in kept for position in positions) == list(range(len(ITEMS)))
    assert {logprob.device.type for _, logprob in kept} == {"cpu"}
    assert (copies.to_device, copies.to_host) == (MOST_COPIES * len(scored), len(scored))
    assert events[:4] == ["copied", "copied", "waited for", "copied"], "one is pending while the next is launched"
    assert len(events) == 2 * len(scored) > 4 and events[-1] == "waited for"


# ---- what is planted is found, with file and line ------------------------------------------------------------------


def test_an_item_in_the_forward_is_found(monkeypatch):
    usual = hybrid.model_inputs

    def with_item(batch):
        batch.position_ids.max().item()
        return usual(batch)

    monkeypatch.setattr(hybrid, "model_inputs", with_item)
    with pytest.raises(
        HostWaits, match=r"tests/without_gpu/test_fake_cuda.py:\d+: batch.position_ids.max\(\).item\(\)"
    ):
        joint_loss(monkeypatch)


def test_a_cpu_tensor_in_the_loss_is_found(monkeypatch):
    usual = loop.joint_loss

    def with_cpu_tensor(objective, weights, scores, reference, comparisons, trains_reward):
        margin = comparisons.margin + torch.ones(len(comparisons.margin))
        changed = replace(comparisons, margin=margin)
        return usual(objective, weights, scores, reference, changed, trains_reward)

    monkeypatch.setattr(loop, "joint_loss", with_cpu_tensor)
    with pytest.raises(HostWaits, match=r"test_fake_cuda.py:\d+: margin = comparisons.margin \+ torch.ones"):
        joint_loss(monkeypatch)


@pytest.mark.parametrize("copy", ["blocking", "not pinned", "to the CPU"])
def test_a_blocking_copy_in_the_loop_is_found(monkeypatch, copy):
    def move(micro_batch, device):
        if copy == "blocking":
            micro_batch.weight.pin_memory().to(device)
        elif copy == "not pinned":
            micro_batch.weight.to(device, non_blocking=True)
        else:
            torch.ones(1, device=device).cpu()

    monkeypatch.setattr(MicroBatch, "to", move)
    with pytest.raises(HostWaits, match=r"test_fake_cuda.py:\d+: .*(micro_batch.weight|cpu\(\))"):
        joint_loss(monkeypatch)
