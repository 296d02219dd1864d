"""Make a folder that other software loads, out of the final/ folder of a training, or such a folder of a checkpoint.

    python launch/export.py --model RUN/final --format policy --output_dir DIR
    python launch/export.py --model RUN/final --format sequence-classification --output_dir DIR
    python launch/export.py --model RUN/final --format adapter --output_dir DIR
    python launch/export.py --model RUN/checkpoints/step-N --format hybrid --output_dir DIR [--base MODEL]

policy: the causal language model. sequence-classification: the reward model for AutoModelForSequenceClassification,
with a pad token that never ends a text. adapter: the LoRA adapter and the reward head, without the base that they are
put on. The export is reopened, the first two by transformers, and must give the scores of the model.

hybrid: what final/ would be if the run had ended with this checkpoint. --base says where the weights lie now that the
run started from, if they have moved.
"""

import argparse
from pathlib import Path

from hafrm_ds.errors import run_alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the final/ folder of a training, or a checkpoint")
    parser.add_argument("--format", required=True, help="policy, sequence-classification or adapter; hybrid")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the export; must not exist")
    parser.add_argument("--trust_remote_code", action="store_true", help="run modelling code that comes with the model")
    parser.add_argument("--trust_pickle", action="store_true", help="read weights that are not in safetensors")
    parser.add_argument("--base", help="hybrid: folder or hub id of the weights that the run started from")
    arguments = parser.parse_args()
    if arguments.base and arguments.format != "hybrid":
        parser.error("--base is for --format hybrid, which starts from a checkpoint")
    if arguments.format == "hybrid":
        from hafrm_ds.training.final import export_checkpoint

        step = export_checkpoint(
            arguments.model,
            arguments.output_dir,
            base=arguments.base,
            trust_remote_code=arguments.trust_remote_code,
        )
        print(f"{arguments.output_dir}: the model after step {step}, as final/ would be")
        return
    from hafrm_ds.saved.export import FORMATS, export_model

    if arguments.format not in FORMATS:
        parser.error(f"--format {arguments.format}: it is one of {', '.join(FORMATS)} and hybrid")
    exported = export_model(
        arguments.model,
        arguments.format,
        arguments.output_dir,
        trust_remote_code=arguments.trust_remote_code,
        trust_pickle=arguments.trust_pickle,
    )
    pad = exported.pad_token
    print(f"{exported.folder}: {f'pad token {pad.text!r} ({pad.id})' if pad else 'pad token left as it was'}")
    print(
        f"reopened: {exported.values} that differ from the model's by at most "
        f"{exported.largest_difference:.2g} of 1 + their size"
    )


if __name__ == "__main__":
    run_alone(main)
