"""Runs that must be refused, one after another: `refusal_cases.py FILE FOLDER`.

FILE holds {name: options}. Each rank leaves FOLDER/RANK.json: {name: [message or null, whether this rank printed it]}.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch.distributed as dist

from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.errors import UserError
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.training.run import train


def main() -> None:
    file, folder = (Path(word) for word in sys.argv[1:] if not word.startswith("--"))
    shared = Processes.join()
    outcomes = {}
    for name, options in json.loads(file.read_text()).items():
        store = dist.PrefixStore(name, shared.store)
        processes = dataclasses.replace(shared, store=store, first_store=None)
        try:
            train(load_config(options), processes)
            outcomes[name] = [None, False]
        except UserError as error:
            outcomes[name] = [str(error), processes.report(error)]
    (folder / f"{shared.rank}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
