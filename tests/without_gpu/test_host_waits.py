"""A real step on the CPU in which no operation's result may decide what the host does next: on a GPU it would wait.

transformers asks a fake tensor less than a real one, so this finds what tests/without_gpu/test_fake_cuda.py does not.
"""

import pytest
import torch

from hafrm_ds.data.packing import lay_out
from tests.tiny_models import EXPERTS, FAMILIES, pair_losses, random_items, tiny_hybrid, use_layout
from tests.without_gpu.fake_cuda import HostWaits, NoDataDependence

ITEMS = random_items(seed=3, num_items=6)
KNOWN = {"shared_prefix": (), "packed": (), "padded": ("transformers/masking_utils.py",)}
"""transformers looks whether the mask of a padded batch hides anything."""


@pytest.mark.parametrize("layout", KNOWN)
@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_a_step_asks_no_tensor_for_its_values(family, layout):
    if family == "gpt-oss" and layout != "padded":
        pytest.skip("its attention has sinks, which these layouts do not know")
    model = tiny_hybrid(family).bfloat16()
    use_layout(model, layout)
    batch = lay_out(ITEMS, layout)
    with NoDataDependence(KNOWN[layout]):
        scores = model(batch, with_router=family in EXPERTS)
        reference = torch.zeros_like(scores.logprob).detach()
        loss = pair_losses(scores.reward, scores.logprob, reference)
        (loss if scores.router is None else loss + scores.router.loss).mean().backward()
    assert all(p.grad is not None for p in model.reward_head.parameters())


def test_a_question_is_found():
    with (
        pytest.raises(HostWaits, match=r"tests/without_gpu/test_host_waits.py:\d+: if torch.ones\(2\).any\(\):"),
        NoDataDependence(),
    ):
        if torch.ones(2).any():
            pass
