"""The model card of a saved or exported model, from the content of its hafrm.json alone."""

import re
from pathlib import Path
from typing import Any

import yaml

from hafrm_ds.data.sources import is_hub_id

FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)

USES = {
    "hybrid": (
        "The policy is a causal language model (`AutoModelForCausalLM`); the reward head lies beside it in "
        "`reward_head.safetensors`. Both are loaded by\n\n"
        "    from hafrm_ds import HybridRewardModel\n"
        "    model = HybridRewardModel.from_pretrained(FOLDER)\n"
        "    model.score(messages)\n"
    ),
    "adapter": (
        "A LoRA adapter of the policy, as peft saves them, and the reward head in `reward_head.safetensors`. Both are "
        "put on the base model by\n\n"
        "    from hafrm_ds import HybridRewardModel\n"
        "    model = HybridRewardModel.from_pretrained(FOLDER)\n"
        "    model.score(messages)\n\n"
        "`peft.AutoPeftModelForCausalLM` loads the policy alone.\n"
    ),
    "policy": "The policy of a hybrid reward model, a causal language model (`AutoModelForCausalLM`).\n",
    "sequence-classification": (
        "A reward model (`AutoModelForSequenceClassification`, one label). The score of a conversation is the logit of "
        "its whole rendering:\n\n"
        "    inputs = tokenizer.apply_chat_template(messages, return_tensors='pt', return_dict=True)\n"
        "    score = model(**inputs).logits[0, 0]\n"
    ),
}


def base_license(folder: Path) -> str | None:
    """The licence that a model folder names: in the front matter of its card, else the first line of its LICENSE."""
    card, license_file = folder / "README.md", folder / "LICENSE"
    if card.is_file() and (match := FRONT_MATTER.match(card.read_text(errors="replace"))):
        try:
            facts = yaml.safe_load(match[1])
        except yaml.YAMLError:
            facts = None
        if isinstance(facts, dict) and isinstance(facts.get("license"), str):
            return facts["license"]
    if license_file.is_file():
        lines = license_file.read_text(errors="replace").split("\n")
        return next((line.strip() for line in lines if line.strip()), None)
    return None


def model_card(metadata: dict[str, Any]) -> str:
    """README.md of a model folder. Sections are left out where hafrm.json says nothing of them."""
    base = metadata.get("base", {})
    name = base.get("model", "an unnamed model")
    front = {
        key: value
        for key, value in {
            "base_model": name if is_hub_id(name) else None,  # the hub takes no local path here
            "license": base.get("license"),
            "library_name": "peft" if metadata["format"] == "adapter" else "transformers",
            "pipeline_tag": "text-classification" if metadata["format"] == "sequence-classification" else None,
            "tags": ["reward-model", "hafrm_ds"],
        }.items()
        if value is not None
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
        f"# Reward model from {name if is_hub_id(name) else Path(name).name}\n",
        f"Trained with hafrm_ds {metadata['hafrm_ds']}. {USES[metadata['format']]}",
        read_out_in_words(metadata),
    ]
    if (judge := metadata.get("judge")) and metadata["format"] in ("hybrid", "adapter"):
        parts.append(
            "`hafrm_ds.load_judge(FOLDER, 'combined')` scores by reward head and policy as one judge, weighted by a "
            f"fit on {judge['pairs']:,} pairs of {judge['set']}. Such scores compare answers to one prompt.\n"
        )
    if base:
        parts.append(f"Licence of the base model: {base.get('license') or 'its folder names none'}.\n")
    if data := metadata.get("data"):
        rows = [[name, *(counts[key] for key in ("read", "kept", "dropped", "cut"))] for name, counts in data.items()]
        parts += ["## Data\n", table(["pairs", "read", "used", "dropped", "of the used ones cut"], rows)]
    if evaluation := metadata.get("evaluation"):
        parts.append(f"## Evaluation after step {metadata['training']['steps']}\n")
        names = sorted({name for metrics in evaluation.values() for name in metrics})
        rows = [[name, *(shown(metrics.get(name)) for metrics in evaluation.values())] for name in names]
        parts.append(table(["", *evaluation], rows))
    if config := metadata.get("config"):
        parts += ["## Configuration\n", f"```yaml\n{yaml.safe_dump(config, sort_keys=False, allow_unicode=True)}```\n"]
    return "\n".join(parts)


def read_out_in_words(metadata: dict[str, Any]) -> str:
    if metadata.get("config", {}).get("objective", {}).get("rm_weight") == 0:
        return (
            "It was trained without a reward loss: its reward head says nothing, and `model.score` refuses to ask it.\n"
        )
    said = (
        "The reward is read at the last token of the whole conversation, rendered by the tokenizer's chat template.\n"
    )
    if (names := metadata.get("attributes")) and metadata["format"] == "sequence-classification":
        said += (
            f"The further labels are {', '.join(names)}: the logits plus `label_offsets` of config.json, as the score "
            "has no bias.\n"
        )
    elif names:
        said += f"`model.rate(messages)` gives {', '.join(names)} beside it.\n"
    return said


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
