"""Rewrites the tables of README.md and of documents in docs/ between their `<!-- table: NAME -->` marks.

`make tables` rewrites all of them: it runs the benchmarks and reads runs/quickstart. `python docs/tables.py sizes` does one.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = (sys.executable, "-m", "benchmarks")
DOCUMENTS = [
    ROOT / name
    for name in (
        "README.md",
        "docs/benchmarks.md",
        "docs/cluster.md",
        "docs/collapse.md",
        "docs/fp8.md",
        "docs/gpu-rehearsal.md",
        "docs/kernels.md",
        "docs/synthesis-filters.md",
        "docs/throughput.md",
    )
]


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head; the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def sizes() -> str:
    """Named model sizes, counted."""
    from megatron_synth.config.load import load_yaml
    from megatron_synth.config.schema import ModelConfig
    from megatron_synth.core.log import human
    from megatron_synth.estimate.flops import count_parameters

    counted = []
    for file in sorted((ROOT / "configs" / "model").glob("*.yaml")):
        model = ModelConfig(**load_yaml(file)["model"])
        counted.append((count_parameters(model, 50_000).non_embedding, model))
    rows = [["configs/model/", "non-embedding parameters", "layers", "hidden", "MLP", "heads", "KV heads"]]
    for parameters, model in sorted(counted, key=lambda entry: entry[0]):
        shape = (model.num_layers, model.hidden_size, model.ffn_hidden_size, model.num_attention_heads, model.query_groups)
        rows.append([f"`{model.name}`", human(parameters), *map(str, shape)])
    return markdown(rows)


def quickstart() -> str:
    """What the quickstart's ledger and evaluation say."""
    run = ROOT / "runs" / "quickstart"
    if not (run / "ledger.json").is_file():
        sys.exit(f"{run}: run `make quickstart` first")
    ledger = json.loads((run / "ledger.json").read_text())
    # the last step's record holds the evaluation at the end of the run
    evaluation = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    info = json.loads((run / "run.json").read_text())
    rows = [["source or domain", "ratio asked", "tokens delivered", "share", "validation loss", "bits/byte"]]
    names = [*ledger["sources"], *(key.removeprefix("eval/loss/") for key in evaluation if key.startswith("eval/loss/"))]
    for name in dict.fromkeys(names):
        source = ledger["sources"].get(name)
        delivered = ["not trained on", "0", ""]
        if source is not None:
            delivered = [source["ratio"], f"{source['tokens']:,}", f"{source['share']:.6f}"]
        loss, bpb = evaluation.get(f"eval/loss/{name}"), evaluation.get(f"eval/bpb/{name}")
        rows.append([name, *delivered, *("" if value is None else f"{value:.3f}" for value in (loss, bpb))])
    commit = (info["git"] or {}).get("commit", "no commit")[:10]
    return f"{markdown(rows)}\n\n`make quickstart`, {info['device']} ({info['layout']}), {info['created'][:10]}, {commit}."


def cpu_speed() -> str:
    """The engine against plain loops on this machine, as `bench train` prints it."""
    return printed("bench", "train", "--vs", "hf,plain")


def loader_ours() -> str:
    """Our loader in all its ways, as `python -m benchmarks loader` prints it."""
    return printed("loader", "--only", "ours", start=BENCHMARKS)


def loader_peers() -> str | None:
    """Others' loaders. PEERS: the Pythons of the environments that they are in, joined by colons; None without."""
    others = [part for python in os.environ.get("PEERS", "").split(":") if python for part in ("--peers", python)]
    return printed("loader", "--only", "peers", *others, start=BENCHMARKS) if others else None


def prepare() -> str | None:
    """Speed of `prepare` beside others. DATATROVE: the Python of an environment with datatrove; None without."""
    python = os.environ.get("DATATROVE")
    return printed("prepare", "--megabytes", "12", "--datatrove", python, start=BENCHMARKS) if python else None


def prepare_arrays() -> str:
    """Processor time of arrays of a SLURM whose nodes are all on this machine (as root, with tests/install-system.sh done)."""
    bench = [*BENCHMARKS, "prepare", "--shares", "1,4,16", "--megabytes", "100"]
    return printed("--nodes", "4", "--", *bench, start=(sys.executable, "-m", "tests.slurm.lab"))


def levers() -> str:
    """What each lever does on this machine, by the layouts that have it, as `bench train --ablations` measures it."""
    from megatron_synth.bench.gpu import random_source
    from megatron_synth.bench.tables import header_lines
    from megatron_synth.bench.train.ablations_table import spread

    base = ["bench", "train", "--model", "tiny-1m", "train.sequence_length=128", "--warmup", "2", "--steps", "4", "--ablations"]
    layouts = {
        "": "fused loss,recomputation,garbage collection between steps,torch.compile",
        "--ranks 2": "gradients reduced in the backward pass,weights gathered in the forward pass,distributed optimizer",
        "--ranks 2 parallel.overlap_grad_reduce=true parallel.ddp_bucket_size=200000": "gradient buckets",
        "--data real data.sources.random.path={data} data.sources.random.max_epochs=.inf": "read-ahead",
        "--ranks 2 parallel.tensor_model_parallel_size=2": "sequence parallelism",
        "--ranks 2 parallel.pipeline_model_parallel_size=2": "interleaved pipeline",
    }
    lines: list[str] = []
    rows = [["lever", "turned to", "layout", "step time", "CPU time", "peak memory", "losses"]]
    with tempfile.TemporaryDirectory() as folder:
        data = random_source(Path(folder) / "random", 2_000_000)
        for more, names in layouts.items():
            file = Path(folder) / "levers.json"
            more = more.format(data=data)
            command = [sys.executable, "-m", "megatron_synth", *base, names, *more.split(), "--json", str(file)]
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
            document = json.loads(file.read_text())
            lines = lines or [line for line in header_lines(document) if not line.startswith("- command")]
            for one in document["levers"]:
                assert one["status"] == "measured", one
                times = [spread(one["step_time_ratios"]), spread(one["cpu_time_ratios"])]
                apart = "bit-equal" if one["losses_apart"] == 0 else f"within {one['losses_apart']:.0e}"
                layout = document["layout"].split(",")[0]
                rows.append([one["lever"], f"`{one['turned_to']}`", layout, *times, f"x{one['peak_ratio']:.3f}", apart])
    return "\n".join([f"- command: `megatron-synth {' '.join(base)}` on each layout", *lines, "", markdown(rows)])


def coverage() -> str:
    """What coverage selection covers of the built-in corpus, as `python -m benchmarks coverage` prints it."""
    return printed("coverage", start=BENCHMARKS)


def filters() -> str:
    """Precision and recall of the filters of synthetic text, as `python -m benchmarks filters` prints them."""
    return printed("filters", start=BENCHMARKS)


def launch() -> str:
    """The cost of a launch on SLURM nodes that are all on this machine (as root, with tests/install-system.sh done)."""
    bench = [*BENCHMARKS, "launch", "--shared", "/tmp"]
    return printed("--nodes", "16", "--", *bench, start=(sys.executable, "-m", "tests.slurm.lab"))


def memory() -> str:
    """Memory per rank, estimated and allocated, as `bench memory` prints it."""
    return printed("bench", "memory")


def health() -> str:
    """What recording a run's health costs, as `bench health` prints it."""
    return printed("bench", "health")


def published() -> str:
    """Predicted speed beside published runs, as `plan --check` prints it."""
    return printed("plan", "--check")


def scales() -> str:
    """The best layout of some models on paper, from 8 to 4096 GPUs."""
    from megatron_synth.config.load import load_yaml
    from megatron_synth.config.schema import ModelConfig
    from megatron_synth.core.log import gib
    from megatron_synth.estimate.hardware import ACCELERATORS
    from megatron_synth.estimate.published_runs import RUNS, configuration
    from megatron_synth.estimate.search import search

    sizes = [ModelConfig(**load_yaml(f"model/{name}.yaml")["model"], vocab_size=50_304) for name in ("llama-1.3b", "3b")]
    sizes.append(next(run.model for run in RUNS if run.model.name == "Llama-3 8B"))
    rows = [["model", "H200", "tokens/step", "best layout", "GiB", "tokens/s/GPU", "MFU", "not in products or attention"]]
    for model in sizes:
        for gpus in (8, 64, 512, 4096):
            config = configuration(model, 4096, max(1024, gpus))
            best = search(config, gpus, ACCELERATORS["h200"])[0]
            time = best.time
            rest = 1 - (time.gemm + time.attention) / time.total
            tokens = f"{config.train.tokens_per_step / 2**20:.0f}M"
            figures = [f"{best.tokens_per_s:,.0f}", f"{100 * best.mfu:.1f}%", f"{100 * rest:.0f}%"]
            rows.append([model.name, str(gpus), tokens, best.describe(), gib(best.needed), *figures])
    return markdown(rows)


def fp8_passes() -> str:
    """Bytes that a layer's quantizing moves, by place."""
    from docs.fp8_passes import GRADIENT, PLACES

    rows = [["tensor", "numbers"]]
    for scalings in ("`delayed`, `blockwise`", "`current`"):
        rows[0] += [f"{scalings}: {way}" for way in ("apart", "fused", "floor")]
    for place in PLACES:
        ways = [str(value) for known in (place.known, place.current) for value in astuple(known)]
        rows.append([place.name, place.symbol, *ways])
    rows.append(["weights' gradients, per micro-batch", "W", *2 * [str(value) for value in astuple(GRADIENT)]])
    return markdown(rows)


def fp8_passes_models() -> str:
    """The same of whole models: a layer's bytes in a step, and what a step's take at the bandwidth of an H200."""
    from docs.fp8_passes import Scaling, bytes_per_step
    from megatron_synth.config.load import load_file, load_yaml
    from megatron_synth.config.schema import Config, ModelConfig
    from megatron_synth.estimate.hardware import ACCELERATORS
    from megatron_synth.estimate.step_time import Assumptions

    train = load_file(Config, "bench/h200.yaml").train
    micro_batches = train.global_batch_size // train.micro_batch_size
    models = [ModelConfig(**load_yaml(f"model/{name}.yaml")["model"]) for name in ("llama-1.3b", "llama-3b", "llama-8b")]
    speed = ACCELERATORS["h200"].memory_bandwidth * Assumptions().memory
    rows = [["model", "recipe", "apart, GB", "fused, GB", "floor, GB", "apart, ms", "fused, ms", "floor, ms"]]
    recipes: tuple[tuple[str, Scaling], ...] = (("`delayed`, `blockwise`", "delayed"), ("`current`", "current"))
    for model in models:
        for name, scaling in recipes:
            ways = astuple(bytes_per_step(model, scaling, train.tokens_per_step, micro_batches))
            times = [f"{1000 * model.num_layers * value / speed:.0f}" for value in ways]
            rows.append([model.name, name, *(f"{value / 1e9:.1f}" for value in ways), *times])
    note = (
        f"GB per layer, ms of all layers, in a step of {train.tokens_per_step:,} tokens in {micro_batches} micro-batches, at "
        f"{speed / 1e12:.1f} TB/s,\nas a copy on an H200. Counted by `python docs/tables.py fp8-passes-models`, not measured."
    )
    return f"{markdown(rows)}\n\n{note}"


def printed(*arguments: str, start: Sequence[str] = (sys.executable, "-m", "megatron_synth")) -> str:
    """The header and the table that a command prints."""
    command = [*start, *arguments]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    return "\n".join(line for line in lines if line.startswith(("- ", "|")) or not line).strip()


def kernels_compiled() -> str:
    """What the Triton kernels compile to, and by which versions."""
    from importlib.metadata import version

    command = [sys.executable, "-W", "ignore", "-m", "megatron_synth", "kernels", "--compile"]
    table = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    git = ["git", "rev-parse", "--short=10", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT).stdout.strip() or "no commit"
    today = datetime.date.today().isoformat()
    return f"{table}\n\n`megatron-synth kernels --compile`, triton {version('triton')}, no GPU, {today}, {commit}."


def gpu_rehearsal() -> str | None:
    """What `make gpu-rehearsal` has written; it needs torch's CUDA build in an environment of its own."""
    written = ROOT / "build" / "rehearsal-out" / "table.md"
    return written.read_text().strip() if written.exists() else None


def _generation(study: str) -> dict[str, Any]:
    """What the report of a study says of the text that it made."""
    file = ROOT / "runs" / "study" / study / "report" / "generation.json"
    if not file.is_file():
        sys.exit(f"{file}: run `make {study}` first")
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def _change(one: dict[str, Any] | None) -> str:
    if one is None:
        return "n/a"
    low, high = one["interval"]
    return f"{100 * one['value']:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]"


def _foot(study: str, content: dict[str, Any]) -> str:
    made = content["corpora"]
    commit = (made[-1]["git"] or {}).get("commit", "no commit")[:10]
    processor = sum(one["processor_seconds"] for one in made)
    return f"`make {study}`, {made[-1]['finished'][:10]}, {commit}; {len(made)} corpora, {processor:.0f} s of processor time."


def collapse_rounds() -> str:
    """Loss by round beside real text alone, with the verdict."""
    content = _generation("collapse")
    rows = [["loop", "protocol", "round 1", "round 2", "round 3 [90 %]", "slope per round [90 %]", "p rises", "verdict"]]
    for loop in content["loops"]:
        first, second, last = loop["contrast"]["by_round"]
        steps = [f"{100 * one['value']:+.1f} %" for one in (first, second)]
        tests = [_change(last), _change(loop["contrast"]["rise"]), f"{loop['p_rises']:.3f}", loop["verdict"]]
        rows.append([loop["name"], loop["protocol"], *steps, *tests])
    return f"{markdown(rows)}\n\n{_foot('collapse', content)}"


def collapse_text() -> str:
    """What the text of each round has lost; in brackets a natural draw of as many tokens."""
    content = _generation("collapse")
    rows = [["loop", "round", "tokens", "tail tokens lost", "KL(text, natural)", "KL(natural, text)"]]
    for loop in content["loops"]:
        for number, text in enumerate(loop["text"], start=1):
            cells = [f"{100 * text['lost']:.1f} % ({100 * text['lost_by_chance']:.1f} %)"]
            cells += [f"{text[key]:.3f} ({text[f'{key}_by_chance']:.3f})" for key in ("kl", "kl_reverse")]
            rows.append([loop["name"], str(number), f"{text['tokens']:,.0f}", *cells])
    return markdown(rows)


def kinds() -> str:
    """What the text of each kind cost and was worth."""
    content = _generation("kinds")
    heads = ["arm", "kept of asked", "written", "seconds", "generation / training", "loss", "at equal tokens [90 %]"]
    rows = [[*heads, "at equal compute [90 %]"]]
    for one in content["costs"]:
        share = "n/a" if one["generation_flops"] is None else f"{one['generation_flops'] / one['train_flops']:.3f}"
        made = [f"{one['kept']:,.0f} of {one['asked']:,.0f}", f"{one['tokens_out']:,.0f}", f"{one['seconds']:.1f}", share]
        rows.append([one["arm"], *made, f"{one['loss']:.3f}", _change(one["equal_tokens"]), _change(one["equal_compute"])])
    return f"{markdown(rows)}\n\n{_foot('kinds', content)}"


TABLES: dict[str, Callable[[], str | None]] = {
    "sizes": sizes,
    "quickstart": quickstart,
    "cpu-speed": cpu_speed,
    "loader-ours": loader_ours,
    "loader-peers": loader_peers,
    "prepare": prepare,
    "prepare-arrays": prepare_arrays,
    "levers": levers,
    "collapse-rounds": collapse_rounds,
    "collapse-text": collapse_text,
    "kinds": kinds,
    "coverage": coverage,
    "filters": filters,
    "launch": launch,
    "kernels-compiled": kernels_compiled,
    "gpu-rehearsal": gpu_rehearsal,
    "memory": memory,
    "health": health,
    "fp8-passes": fp8_passes,
    "fp8-passes-models": fp8_passes_models,
    "published": published,
    "scales": scales,
}


def replace(text: str, name: str, table: str) -> str:
    """`text` with the table between the marks of `name` replaced."""
    pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text)


def main(names: list[str]) -> None:
    """Rewrite the named tables wherever they stand."""
    for name in names or TABLES:
        table = TABLES[name]()
        if table is None:
            print(f"{name}: left as it is; see {TABLES[name].__name__} in docs/tables.py")
            continue
        for document in DOCUMENTS:
            text = document.read_text()
            document.write_text(replace(text, name, table))
        print(f"{name}: {len(table.splitlines())} lines")


if __name__ == "__main__":
    main(sys.argv[1:])
