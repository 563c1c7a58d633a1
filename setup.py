"""What pyproject.toml cannot say: the packages that stand elsewhere in the repository, and the compiled part."""

import hashlib
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
NATIVE = ROOT / "megatron_synth" / "data" / "shards" / "native.c"

# configs/ and launch/ stand at the top of the repository and are installed inside the package, so that a wheel works
# without the clone. The kernels' folder is not a package itself: a top-level `kernels` would shadow Hugging Face's.
FOLDERS = {"megatron_synth.configs": "configs", "megatron_synth.launch": "launch"}

setup(
    packages=[
        *find_packages(include=["megatron_synth", "megatron_synth.*"]),
        *find_packages("kernels"),
        *(name for name, folder in FOLDERS.items() if (ROOT / folder).is_dir()),
    ],
    package_dir={"megatron_synth_kernels": "kernels/megatron_synth_kernels", **FOLDERS},
    package_data={
        "megatron_synth": ["py.typed"],
        "megatron_synth.data.preparing": ["builtin/*"],
        "megatron_synth.study.plan": ["reference.yaml"],
        "megatron_synth.synthesis.kinds": ["templates/*.yaml"],
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
            # by which native.py knows that what was compiled is what is there now
            define_macros=[("SOURCE_DIGEST", f"0x{hashlib.sha256(NATIVE.read_bytes()).hexdigest()[:15]}")],
            depends=["setup.py"],
            optional=True,
        )
    ],
)
