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

import sys
from pathlib import Path
from typing import Literal

from hafrm_ds.errors import run_alone
from hafrm_ds.options import Section, read


class ExportOptions(Section):
    """What is exported, and how."""

    model: Path
    """The final/ folder of a training, or for hybrid a checkpoint."""
    format: Literal["policy", "sequence-classification", "adapter", "hybrid"]
    """What the export is to be, as said above."""
    output_dir: Path
    """Folder of the export; must not exist."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the model."""
    trust_pickle: bool = False
    """Read weights that are not in safetensors."""
    base: str | None = None
    """hybrid only: folder or hub id of the weights that the run started from."""

    def contradictions(self) -> list[str]:
        if self.base and self.format != "hybrid":
            return ["--base is for --format hybrid, which starts from a checkpoint"]
        return []


def main() -> None:
    options = read(ExportOptions, sys.argv[1:], about=__doc__)
    trust = options.trust_remote_code
    if options.format == "hybrid":
        from hafrm_ds.training.final import export_checkpoint

        step = export_checkpoint(options.model, options.output_dir, base=options.base, trust_remote_code=trust)
        print(f"{options.output_dir}: the model after step {step}, as final/ would be")
        return
    from hafrm_ds.saved.export import export_model

    exported = export_model(
        options.model, options.format, options.output_dir, trust_remote_code=trust, trust_pickle=options.trust_pickle
    )
    pad = exported.pad_token
    print(f"{exported.folder}: {f'pad token {pad.text!r} ({pad.id})' if pad else 'pad token left as it was'}")
    print(
        f"reopened: {exported.values} that differ from the model's by at most "
        f"{exported.largest_difference:.2g} of 1 + their size"
    )


if __name__ == "__main__":
    run_alone(main)
