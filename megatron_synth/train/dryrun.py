"""What a run will be, told in seconds without a GPU, without torch and without reading a token."""

from __future__ import annotations

from pathlib import Path

from megatron_synth.config.data import SourceConfig, ValidationConfig
from megatron_synth.config.load import digest
from megatron_synth.config.schema import NOT_BEGUN, Config, Progress
from megatron_synth.core.log import gib, human, scientific, table
from megatron_synth.data.loading import shared_content
from megatron_synth.data.loading.run_data import chooses, chosen, chosen_domains, open_or_head, plan_of, vocab_size_of
from megatron_synth.data.mixing.tables import phase_tables, source_table
from megatron_synth.data.shards.manifest import Manifest
from megatron_synth.data.shards.source import Source, check_compatible, open_source
from megatron_synth.estimate.flops import count_parameters, flops_per_token
from megatron_synth.estimate.memory import memory_per_rank
from megatron_synth.parallel.plan import Layout, plan
from megatron_synth.storage.remote import Remote, is_remote, location_of


def dry_run(config: Config, world_size: int, progress: Progress = NOT_BEGUN) -> str:
    """Layout, sizes, cost, memory per rank and the mixture of a run on `world_size` ranks, as text.

    progress: of a run that would go on.

    Sources that are not prepared yet are reported as such. Those that are prepared are checked as for training.

    Raises:
        ConfigError: the layout is impossible.
        UserError: a prepared source is damaged, was made with another tokenizer, or is too small for the run.
    """
    layout = plan(config, world_size)
    sources, validation = prepared_sources(config)
    prepared = [source for source in (*sources.values(), *validation.values()) if source]
    vocab_size = vocab_size_of(config, check_compatible(prepared))
    sections = [
        [f"dry run of {config.model.name}, config {digest(config)}: nothing is trained, no tokens are read"],
        ["layout", f"  {layout.describe()}; {_layers(layout)}"],
        ["model", *_model(config, vocab_size, progress)],
    ]
    if vocab_size is not None:
        sections.append(["memory per rank, estimated, GiB", *_memory(config, layout, vocab_size)])
    sections.append(["training sources", *_mixture(config, sources, progress)])
    if validation:
        sections.append(["validation domains", *_validation(validation)])
    opened = [source for source in sources.values() if source is not None]
    domains = {name: domain for name, domain in validation.items() if domain is not None}
    if notes := shared_content.notes(opened, domains, config.data.exclude_parents_of is not None):
        sections.append([f"note: {text}" for text in notes])
    return "\n\n".join("\n".join(section) for section in sections)


def prepared_sources(config: Config) -> tuple[dict[str, Source | None], dict[str, Source | None]]:
    """The sources and domains of a configuration, with the documents they choose; None for one that is not prepared yet."""
    sources = {name: _open_to_choose(config, source, name) for name, source in config.data.sources.items()}
    domains = {name: _open_to_choose(config, domain, name) for name, domain in config.data.validation.items()}
    evaluated = chosen_domains(config, {name: domain for name, domain in domains.items() if domain is not None})
    opened = [source for source in sources.values() if source is not None]
    # with a part of the sources it cannot be said that none has parents, nor which parents all domains have
    if len(opened) + len(evaluated) < len(sources) + len(domains):
        config = config.model_copy(update={"data": config.data.model_copy(update={"exclude_parents_of": None})})
    return {**sources, **{source.name: source for source in chosen(config, opened, evaluated)}}, {**domains, **evaluated}


def _open_to_choose(config: Config, entry: SourceConfig | ValidationConfig, name: str) -> Source | None:
    """The same as `open_if_prepared`, and with what documents are chosen by, where some are and `data.staging` has a place."""
    if is_remote(entry.path) and chooses(config, entry):
        return open_or_head(config, entry, name)
    return open_if_prepared(entry.path, name)


def open_if_prepared(path: str, name: str) -> Source | None:
    """The prepared source, of one in object storage what its manifest tells; None when there is nothing at `path` yet."""
    place = location_of(path, f"source {name!r}")
    if isinstance(place, Remote):
        manifest = Manifest.load(place)
        # what is not read needs no file: the manifest says what there is
        return Source(name, Path(place.name), manifest, memory_map=False)
    prefix = place
    if prefix.is_dir() or any(prefix.parent.glob(f"{prefix.name}.*")) or prefix.is_file():
        return open_source(path, name)
    return None


def _layers(layout: Layout) -> str:
    text = f"{layout.layers_per_stage} layers per stage"
    return text if layout.virtual == 1 else f"{text}, {layout.layers_per_chunk} per chunk"


def _model(config: Config, vocab_size: int | None, progress: Progress) -> list[str]:
    train = config.train
    tokens = config.samples_at_end(progress) * config.window_length
    sizes = " to ".join(map(str, dict.fromkeys((min(train.batch_sizes), max(train.batch_sizes)))))
    size = f"{max(train.steps - progress.step, 0)} steps x {sizes} sequences x {train.sequence_length}"
    if progress.step:
        size = f"{progress.samples * config.window_length:,} in the {progress.step} steps before, {size}"
    lines = [f"  tokens             {tokens:,} ({size})"]
    if vocab_size is None:
        return [*lines, "  parameters         known once the data is prepared, or model.vocab_size is set"]
    parameters = count_parameters(config.model, vocab_size)
    per_token = flops_per_token(config.model, train.sequence_length, vocab_size)
    return [
        *lines,
        f"  vocabulary         {vocab_size:,}, padded to {config.model.padded_vocab_size(vocab_size):,}",
        f"  parameters         {parameters.total:,} ({human(parameters.total)})",
        f"    non-embedding    {parameters.non_embedding:,} ({human(parameters.non_embedding)})",
        f"  tokens/parameter   {tokens / parameters.total:.3g}",
        f"  FLOPs per token    {scientific(per_token)}  = 6 x (body + head) + 12 x layers x query channels x sequence",
        f"  FLOPs in all       {scientific(per_token * tokens)}",
    ]


def _memory(config: Config, layout: Layout, vocab_size: int) -> list[str]:
    heads = ("stage", "weights", "gradients", "optimizer", "activations", "logits", "buffers", "working", "total")
    rows: list[tuple[str, ...]] = [heads]
    for stage, memory in enumerate(memory_per_rank(config, layout.data, vocab_size)):
        rows.append((str(stage), *(gib(getattr(memory, name)) for name in heads[1:])))
    return [table(rows), "  of a GPU's kernels; the framework, the communication library and fragmentation come on top"]


def _mixture(config: Config, sources: dict[str, Source | None], progress: Progress) -> list[str]:
    """The mixture's tables; checks the mixture as far as its sources are prepared."""
    prepared = [name for name, source in sources.items() if source is not None]
    order = plan_of(config, {name: source.num_tokens if source else None for name, source in sources.items()})
    order.check(config.samples_at_end(progress), config.window_length, progress.samples)
    if len(prepared) == len(sources):
        opened = [source for source in sources.values() if source is not None]
        shared_content.check_epochs(order, opened, config.samples_at_end(progress))
    tables = [source_table(config, order, prepared, progress)]
    return [*tables, "", phase_tables(config, order, prepared, progress)] if order.phased else tables


def _validation(domains: dict[str, Source | None]) -> list[str]:
    rows: list[tuple[str, ...]] = [("domain", "tokens")]
    rows += [(name, "not prepared" if source is None else f"{source.num_tokens:,}") for name, source in domains.items()]
    return [table(rows)]
