"""`python -m tests.faults.config_mutations --count 2000`: configurations and names as a stranger would write them.

Each is a shipped file with something hostile in it, read as what it is: a training, data, cluster or study file; or a hostile
name of a run, a job or an option. It must be read or refused by one message, and what is read holds no character that is not
shown, no batch script has a line more than it should, and nothing in a file runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from megatron_synth.cluster import sbatch
from megatron_synth.config import yaml12
from megatron_synth.config.cluster import ClusterConfig
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import load_file, shipped
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.config.schema import Config
from megatron_synth.core.log import visible
from megatron_synth.study.plan.study_file import load_study

HIDDEN = "\x00\x07\x1b\x7f\x85\u00ad\u034f\u115f\u200b\u200f\u2028\u202e\u2066\u2800\u3164"
HIDDEN += "\ue000\ufe0f\ufeff\ufdd0\uffff\U000e0041\U0010fffe"
_MARK = "ran"
FRAGMENTS: tuple[Callable[[Path], str], ...] = (
    lambda folder: f"\nx: !!python/object/apply:os.system ['touch {folder}/{_MARK}']\n",
    lambda folder: f"\nx: !!python/name:os.system\ny: $(touch {folder}/{_MARK})`touch {folder}/{_MARK}`\n",
    lambda folder: "\na: &a [1, 1]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: [" + "*c, " * 20_000 + "1]\n",
    lambda folder: "\na: &a {b: *a}\n",
    lambda folder: "\nx: " + "[" * 5000,
    lambda folder: "\nx: " + "{a: " * 2000,
    lambda folder: "\ntrain: {steps: " + "9" * 50_000 + "}\n",
    lambda folder: "\ntrain: {steps: 0x" + "f" * 50_000 + "}\n",
    lambda folder: "\nx: 1e" + "9" * 5000 + "\n",
    lambda folder: "\ndata: {sources: {a: {path: p, ratio: " + "1" * 5000 + "/3}}}\n",
    lambda folder: "\nbase: [/dev/zero, /dev/stdin, /proc/self/environ, ../../../../etc/passwd]\n",
    lambda folder: "\nbase: hostile.yaml\n",
    lambda folder: "\nbase: [" + "model/tiny-1m.yaml, " * 500 + "]\n",
    lambda folder: "\nbase: " + "x" * 100_000 + "\n",
    lambda folder: "\n" + "k" * 200_000 + ": 1\n",
    lambda folder: "\n<<: {train: {steps: 1}}\n",
    lambda folder: "\n--- \nx: 1\n...\n",
    lambda folder: "\n\ttrain: 1\n",
    lambda folder: "\n? [a, b]\n: 1\n",
    lambda folder: '\nx: "\\uD800"\n',
    lambda folder: '\nx: "\\x1b[2J\\0"\n',
    lambda folder: "\n" + "".join(f"k{number}: 1\n" for number in range(5000)),
    lambda folder: "\n# " + "x" * 2**20 + "\n",
    lambda folder: "\nenv: {LD_PRELOAD: x.so, 'A=B': c, \"X\\nY\": z}\nsbatch: ['--wrap=touch x', \"--a\\n#SBATCH -p x\"]\n",
)
_VALUES = (
    "-1",
    "0",
    ".nan",
    ".inf",
    "1e308",
    "''",
    "null",
    "true",
    "[]",
    "{}",
    "'../../x'",
    "$HOME",
    "'a\"b'",
    "1/0",
    "0/1",
    "'#x'",
)
_ENCODINGS = ("utf-16", "utf-32", "latin-1", "utf-7", "cp500")


def _files() -> list[tuple[Path, Callable[[Path], BaseModel]]]:
    def reader(model: type[BaseModel]) -> Callable[[Path], BaseModel]:
        return lambda file: load_file(model, file)

    kinds = {"train": reader(Config), "bench": reader(Config), "data": reader(PrepareConfig), "cluster": reader(ClusterConfig)}
    kinds["study"] = load_study
    root = shipped("configs")
    return [(file, read) for folder, read in kinds.items() for file in sorted((root / folder).glob("*.yaml"))]


def mutated(text: str, draw: random.Random, folder: Path) -> bytes:
    """A hostile variant of a file."""
    for _ in range(draw.choice((1, 1, 2))):
        lines = text.split("\n")
        place = draw.randrange(len(lines))
        match draw.randrange(6):
            case 0:
                text += draw.choice(FRAGMENTS)(folder)
            case 1:  # something that is not shown, in a key, a value or between
                at = draw.randrange(len(text) + 1)
                text = text[:at] + draw.choice(HIDDEN) + text[at:]
            case 2:
                key, colon, _ = lines[place].partition(":")
                lines[place] = f"{key}{colon} {draw.choice(_VALUES)}"
                text = "\n".join(lines)
            case 3:
                lines.insert(place, lines[draw.randrange(len(lines))])
                text = "\n".join(lines)
            case 4:
                at = draw.randrange(len(text) + 1)
                text = text[:at] + draw.choice("{}[]&*!|>'\"%@`,:-?#") * draw.choice((1, 3, 400)) + text[at:]
            case _:
                del lines[place]
                text = "\n".join(lines)
    if draw.random() < 0.1:
        return text.encode(draw.choice(_ENCODINGS), "replace")
    return text.encode("utf-8", "surrogatepass")


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in _strings(part)]
    if isinstance(value, list | tuple):
        return [text for part in value for text in _strings(part)]
    return [value] if isinstance(value, str) else []


def _read(file: Path, read: Callable[[Path], BaseModel]) -> str:
    try:
        config = read(file)
    except UserError as error:
        assert visible(str(error)) == str(error), f"a message that controls a terminal: {error!a}"
        assert len(str(error)) < 100_000, f"a message of {len(str(error))} characters"
        return "refused"
    for text in _strings(config.model_dump(mode="json")):
        assert not set(text) & set(HIDDEN), f"hidden characters were read: {text!a}"
    assert yaml.safe_load(yaml12.dump(config.model_dump(mode="json"))) is not None
    return "read"


def _name(draw: random.Random) -> str:
    alphabet = HIDDEN + "\"'\\\n\r\t $`;&|<>(){}[]*?!#%~-=,:@/..äé漢a" + "abc"
    return "".join(draw.choice(alphabet) for _ in range(draw.choice((1, 3, 10, 60))))


def _render(draw: random.Random, folder: Path) -> str:
    """A batch script with a hostile name, folder and option."""
    plain = sbatch.JobSpec(name="job", folder=folder / "job", chdir=folder, arguments=("a", "b"))
    lines = len(sbatch.render(plain).splitlines())
    directives = sbatch.render(plain).count("#SBATCH")
    name = _name(draw)
    changes: dict[str, Any] = {
        "name": {"name": name},
        "chdir": {"chdir": folder / name.replace("\x00", "")},
        "arguments": {"arguments": (name, "b")},
        "cluster": {},
    }[what := draw.choice(("name", "chdir", "arguments", "cluster"))]
    try:
        if what == "cluster":
            changes = {"cluster": sbatch.changed(ClusterConfig(), partition=name)}
            directives += 1
            lines += 1
        script = sbatch.render(dataclasses.replace(plain, **changes))
    except UserError:
        return "name refused"
    assert script.count("\n#SBATCH") + script.startswith("#SBATCH") <= directives, f"{what} {name!a}: another option"
    if what != "arguments":  # shell quoting may hold line breaks, which stay inside it
        assert len(script.split("\n")) <= lines + 1, f"{what} {name!a}: another line"
    return "name quoted"


def campaign(folder: Path, count: int, seed: int) -> tuple[dict[str, int], float]:
    """Read `count` hostile files or names. Returns what happened how often, and the longest time that one took, in seconds.

    Raises:
        AssertionError, or whatever else came: the file that did it is hostile.yaml below `folder`.
    """
    shutil.copytree(shipped("configs"), folder / "configs", dirs_exist_ok=True)
    draw, happened, longest, files = random.Random(seed), Counter[str](), 0.0, _files()
    for _ in range(count):
        began = time.process_time()
        if draw.random() < 0.2:
            happened[_render(draw, folder)] += 1
        else:
            file, read = draw.choice(files)
            hostile = folder / "configs" / file.parent.name / "hostile.yaml"  # where its bases are found
            hostile.write_bytes(mutated(file.read_text(encoding="utf-8"), draw, folder))
            happened[_read(hostile, read)] += 1
        longest = max(longest, time.process_time() - began)
        assert not (folder / _MARK).exists(), "something in a file ran"
    return dict(happened), longest


def main(argv: list[str]) -> int:
    """Run a campaign and print what happened."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.config_mutations", description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="configs-"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    happened, longest = campaign(folder, options.count, options.seed)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    shutil.rmtree(folder)
    print(
        f"{options.count} hostile files and names: {', '.join(f'{n} {what}' for what, n in sorted(happened.items()))}; "
        f"the longest took {longest:.2f} s of the processor, and the process grew by {grown:.0f} MiB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
