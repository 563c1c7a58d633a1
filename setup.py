"""Packaging. Tool settings are in pyproject.toml, tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_synth/__init__.py").read_text(), re.MULTILINE)[1]

# configs/ and launch/ stand at the top of the repository and are installed inside the package, so that a wheel works
# without the clone. The kernels' folder is not a package itself: a top-level `kernels` would shadow Hugging Face's.
FOLDERS = {"megatron_synth.configs": "configs", "megatron_synth.launch": "launch"}

setup(
    name="megatron-synth",
    version=VERSION,
    description="Pre-training of language models on exact mixtures of natural and synthetic text",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["megatron_synth", "megatron_synth.*"]),
        *find_packages("kernels"),
        *(name for name, folder in FOLDERS.items() if (ROOT / folder).is_dir()),
    ],
    package_dir={"megatron_synth_kernels": "kernels/megatron_synth_kernels", **FOLDERS},
    package_data={
        "megatron_synth": ["py.typed"],
        "megatron_synth.configs": ["**/*.yaml"],
        "megatron_synth.launch": ["*"],
    },
    include_package_data=False,
    # plain C that is loaded by ctypes: a compiler is all it needs; without one numpy does its work
    ext_modules=[
        Extension(
            "megatron_synth.data.shards._native",
            ["megatron_synth/data/shards/native.c"],
            extra_compile_args=["-O3"],
            optional=True,
        )
    ],
    install_requires=[
        "argcomplete",
        "torch>=2.6",
        "megatron-core>=0.16,<0.17",
        "numpy",
        "psutil",
        "pydantic>=2.7",
        "pyyaml",
        "datasets",
        "tokenizers",
        "wandb",
        "safetensors",
        "xxhash",
        "zstandard",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.9,<2.12", "triton"],
        "study": ["matplotlib", "scipy"],
        # for `python -m benchmarks loader --peers`, in an environment of its own: OLMo-core needs an older huggingface_hub
        "bench-peers": ["ai2-olmo-core==3.0.0", "grain==0.2.18"],
        "test": [
            "hypothesis",
            "import-linter",
            "matplotlib",
            "mypy",
            "pytest",
            "pytest-xdist",
            "ruff",
            "scipy",
            "transformers",
            "triton; sys_platform == 'linux'",
            "types-PyYAML",
            "types-psutil",
        ],
    },
    entry_points={"console_scripts": ["megatron-synth=megatron_synth.cli.main:main"]},
)
