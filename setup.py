"""Packaging. The version is read from the package's text: importing it would need what is installed here."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "hafrm_ds" / "__init__.py").read_text(), re.MULTILINE).group(1)

setup(
    name="hafrm_ds",
    version=VERSION,
    description="A DeepSpeed trainer for hybrid reward models: reward loss and DPO loss on one body",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["hafrm_ds", "hafrm_ds.*"]),
    package_data={
        "hafrm_ds": ["quickstart.yaml", "style.css"],
        "hafrm_ds.evaluation.report": ["templates/*"],
        "hafrm_ds.serving": ["page.html"],
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "accelerate>=1.1",  # transformers asks for it before it loads a model in shards for ZeRO-3
        # engine/ reads private fields, which change between minor versions. Tested: 0.19.8. Before 0.19.5 it cannot be
        # imported beside a GPU without a CUDA toolkit; before 0.19.2 it rounds rotary frequencies to bfloat16.
        "deepspeed>=0.19.5,<0.20",
        "ninja",  # DeepSpeed compiles its CPU communication and optimizer ops at the first start
        "huggingface_hub",
        "datasets>=4.3",  # Dataset.from_generator takes a fingerprint
        "pyarrow",
        "filelock",
        "sentencepiece",
        "protobuf",  # without it transformers cannot read a sentencepiece model
        "safetensors",
        "numpy",
        "pandas",
        "jinja2",
        "markupsafe",
        "matplotlib>=3.11",
        "pyyaml",
        "pydantic>=2.10",
        "psutil",
        "xxhash",
        "rich",
        "tensorboard",
    ],
    extras_require={
        "cuda": ["flash-attn-4>=4.0.0b22"],  # earlier ones lack the backward of sm_90, or windows, for many lengths
        "liger": ["liger-kernel>=0.8.5"],  # for model.fused; earlier ones rotate whole heads alone
        "triton": ["triton"],  # for model.log_probs triton; torch's own wheels for CUDA bring the right one
        "lora": ["peft>=0.18"],
        "qlora": ["peft>=0.18", "bitsandbytes>=0.46"],
        "correct": ["openai>=3"],  # launch/correct.py, and rubrics
        "rl": ["trl>=1.16"],  # launch/policy.py
        "serve": ["starlette>=1.0", "uvicorn>=0.40", "h11"],  # launch/serve.py
        "wandb": ["wandb"],
        "gpu-test": ["liger-kernel>=0.8.5"],  # tests/gpu compares with it
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "import-linter",
            "mypy",
            "pandas-stubs",
            "types-PyYAML",
            "types-psutil",
            "trl>=1.16",
            "peft>=0.18",
            "starlette>=1.0",
            "uvicorn>=0.40",
            "h11",
            "httpx",
            "openai>=3",
        ],
    },
)
