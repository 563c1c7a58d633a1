"""`megatron-synth config`: what a configuration file comes to, and whether it is sound."""

from __future__ import annotations

import argparse
from pathlib import Path

from pydantic import BaseModel

from megatron_synth.config.errors import EXIT_OK, UserError
from megatron_synth.config.explain import explain
from megatron_synth.config.load import apply_overrides, digest, load_file, load_yaml, to_yaml
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.config.schema import Config
from megatron_synth.core.log import show


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megatron-synth config",
        description="Both verbs take training configurations and, told by their `output` key, preparation ones.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    show = verbs.add_parser("show", help="print every setting, bases merged and defaults filled in")
    check = verbs.add_parser("check", help="tell all problems of a file, or its digest when there are none")
    show.add_argument("--explain", action="store_true", help="with what each setting means, as comments")
    for verb in (show, check):
        verb.add_argument("file", type=Path, help="a YAML file; also looked for in the shipped configs/ folder")
        verb.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings to change: train.steps=10")
    return parser


def main(argv: list[str]) -> int:
    """Run `config show` or `config check` and return the exit code."""
    arguments = parser().parse_args(argv)

    config = _load(arguments.file, arguments.overrides)
    if arguments.verb == "show":
        show(explain(config) if arguments.explain else to_yaml(config), end="")
    else:
        show(f"{arguments.file}: ok, digest {digest(config)}")
    return EXIT_OK


def _load(path: Path, overrides: list[str]) -> BaseModel:
    content = apply_overrides(load_yaml(path), overrides)
    if set(content) == {"model"}:
        raise UserError(f"{path}: holds a model section alone, to be named under `base:` of a training configuration")
    return load_file(PrepareConfig if "output" in content else Config, path, overrides)
