"""What segment attention refuses; that it is right is tested on whole models, in test_hybrid."""

import pytest
import torch
from transformers import LlamaConfig

from hafrm_ds.data.packing import PromptWithResponses, lay_out
from hafrm_ds.errors import ModelError
from hafrm_ds.model.attention import KERNELS, choose_kernel, segment_attention
from tests.tiny_models import tiny_hybrid, use_layout

SEGMENTS = lay_out([PromptWithResponses([5, 6], ([7], [8, 9]))], "shared_prefix").segments


def attend(mask: torch.Tensor | None = None, kernel: str = "segmented", **arguments):
    states = torch.randn(1, 2, 5, 8)
    module = torch.nn.Identity()
    return segment_attention(KERNELS[kernel], module, states, states, states, mask, segments=SEGMENTS, **arguments)


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_a_tensor_that_would_change_the_scores_is_refused(name):
    """Attention sinks (gpt-oss), ALiBi: ignoring them would give other scores than the model's own."""
    with pytest.raises(ModelError, match=rf"Identity gives {name} to its attention.*--batch.layout padded"):
        attend(**{name: torch.zeros(2)})


def test_a_mask_is_refused():
    """A model that builds one would hide what the segments show."""
    with pytest.raises(ValueError, match="takes no mask"):
        attend(mask=torch.ones(5, 5))


def test_a_forward_without_segments_fails():
    """No segments would mean that every token sees every earlier one."""
    model = tiny_hybrid("llama")
    use_layout(model, "shared_prefix")
    with pytest.raises(TypeError, match="segments"):
        model.causal_lm(torch.arange(3, 9)[None], use_cache=False)


@pytest.mark.parametrize(
    ("options", "dtype", "capability", "reason"),
    [
        ({"head_dim": 100}, torch.bfloat16, 9, "multiples of 8, not 100"),  # OpenLLaMA 3B
        ({"head_dim": 264}, torch.bfloat16, 9, "up to 256 dimensions"),
        ({"head_dim": 64}, torch.float32, 9, "has no float32"),
        ({"head_dim": 64}, torch.bfloat16, 7, "compute capability 7"),
        ({"head_dim": 64, "attn_logit_softcapping": 50.0}, torch.bfloat16, 9, "no soft cap"),
        ({"head_dim": 128}, torch.bfloat16, 9, None),
    ],
)
def test_what_a_flash_kernel_cannot_run_is_said_and_auto_goes_on_to_another(
    monkeypatch, options, dtype, capability, reason
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    device, config = torch.device("cuda"), LlamaConfig(**options)
    assert KERNELS["segmented"].obstacle(device, dtype, config) is None
    obstacle = KERNELS["varlen"].obstacle(device, dtype, config)
    chosen = choose_kernel("auto", device, dtype, config).name
    if reason is None:
        assert (obstacle, chosen) == (None, "varlen")
    else:
        assert reason in obstacle
        assert chosen == "segmented"
        with pytest.raises(ModelError, match=f"--model.attention varlen cannot be used: .*{reason}"):
            choose_kernel("varlen", device, dtype, config)
