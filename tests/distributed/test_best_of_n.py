"""launch/best_of_n.py as it is run, on two processes, against one."""

import json

import pytest
import torch.distributed as dist

from hafrm_ds.evaluation.best_of_n.options import RankingOptions, SamplingOptions
from hafrm_ds.evaluation.best_of_n.ranking import rank
from hafrm_ds.evaluation.best_of_n.sampling import PART
from hafrm_ds.processes.ranks import Processes
from tests.distributed.launching import launch
from tests.tiny_models import save_tiny_final, save_tiny_model

pytestmark = pytest.mark.distributed


def test_two_processes_leave_the_files_of_one(tmp_path):
    save_tiny_final(tmp_path / "final")
    save_tiny_model(tmp_path / "policy")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"what is {n}"}) + "\n" for n in range(4 * PART)))
    model, policy = str(tmp_path / "final"), str(tmp_path / "policy")
    sampling = SamplingOptions(prompts=prompts, policy=policy, num_candidates=3, max_new_tokens=4)
    alone = Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore())
    rank(RankingOptions(model=[model], output_dir=tmp_path / "one", sampling=sampling), alone)

    command = ["launch/best_of_n.py", "--model", model, "--prompts", str(prompts), "--policy", policy]
    command += ["--num_candidates", "3", "--max_new_tokens", "4", "--output_dir", str(tmp_path / "two")]
    result = launch(2, *command)
    assert result.returncode == 0, result.stdout[-6000:]
    for file in ("candidates.jsonl", "scores-1.jsonl", "ranked.jsonl", "best_of_n.json"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
