"""Peak memory of saving a model that is sharded under ZeRO-3, ours against DeepSpeed's save_16bit_model.

    deepspeed --num_gpus 2 tests/benchmarks/saving_memory.py MODEL OUT stream|save_16bit_model

Each process prints by how much its resident memory grew at most while it saved.
"""

import json
from pathlib import Path

import torch.distributed as dist

from hafrm_ds.config import DataConfig, ModelConfig, TrainConfig
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.sources import Source
from hafrm_ds.engine.engine import load_training_engine
from hafrm_ds.engine.shapes import full_numel
from hafrm_ds.model.loading import load_tokenizer
from hafrm_ds.processes.ranks import Processes, run_entry
from hafrm_ds.saved.writing import save_hybrid_model

MIB = 2**20


def resident(key: str) -> int:
    """Bytes: VmRSS now, VmHWM at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(arguments: list[str], processes: Processes) -> None:
    source, out, how = [word for word in arguments if not word.startswith("--local_rank")]
    folder = Path(out) / how
    json_file = Path(out) / f"zero3-{processes.rank}.json"
    json_file.write_text(
        json.dumps({"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}})
    )
    config = TrainConfig(
        output_dir=Path(out),
        deepspeed=json_file,
        model=ModelConfig(name_or_path=source),
        data=DataConfig(train=[Source(path=".")]),
    )
    formatter = ChatFormatter.create(load_tokenizer(config.model), None, config.data.template_date)
    processes.start_group()
    engine = load_training_engine(config, processes)
    sizes = [full_numel(p) * p.element_size() for p in engine.model.parameters()]
    dist.barrier()
    forget_peak()
    before = resident("VmRSS")
    if how == "stream":
        save_hybrid_model(
            engine.model,
            formatter,
            folder,
            gathered=engine.gathered,
            is_writer=processes.is_first,
            metadata={},
        )
    else:
        engine.deepspeed.save_16bit_model(str(folder))
    growth = resident("VmHWM") - before
    print(
        f"{how}, rank {processes.rank}: {growth / MIB:.0f} MiB more at most; the model has {sum(sizes) / MIB:.0f}, "
        f"its largest parameter {max(sizes) / MIB:.0f}",
        flush=True,
    )


if __name__ == "__main__":
    run_entry(main)
