"""What makes a step faster or smaller, one lever at a time: the settings that turn it, and where it has none to turn.

A lever is turned away from where the configuration has it: what is on is turned off, what is off on. Levers that this
layout, device or build does not have are listed with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_synth.config.errors import ConfigError, UserError
from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.estimate.memory import Device
from megatron_synth.parallel.plan import Layout, plan

ELEMENTWISE = ("rms_norm", "rms_norm_residual", "swiglu", "rope")
"""Operations that torch.compile can make."""
WITH_KERNELS = (*ELEMENTWISE, "cross_entropy_stats", "cross_entropy_grad")
"""Operations of the model that have a Triton kernel."""
READ_AHEAD = "read ahead"
"""No setting of a run: the loader's thread, which a benchmark alone can leave out."""


@dataclass(frozen=True)
class Place:
    """Where levers are turned."""

    config: Config
    layout: Layout
    device: Device
    real_data: bool
    """Whether the steps load their data."""


@dataclass(frozen=True)
class Lever:
    """One of them."""

    name: str
    turned: Callable[[Place], list[tuple[str, ...]]]
    """Other positions than the configuration's: overrides, each a variant."""
    why_not: Callable[[Place], str | None] = lambda place: None
    """Why it cannot be turned there; None: it can."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables of the variant's processes."""
    read_ahead: bool = True


@dataclass(frozen=True)
class Variant:
    """The base with one lever turned."""

    lever: str
    settings: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    read_ahead: bool = True

    @property
    def text(self) -> str:
        """What is different from the base."""
        parts = [*self.settings, *(f"{name}={value}" for name, value in self.environment)]
        return " ".join(parts) if self.read_ahead else "no read-ahead"


@dataclass(frozen=True)
class Refused:
    """A lever, or a position of it, that was not measured."""

    lever: str
    settings: tuple[str, ...]
    reason: str


def _toggled(key: str) -> Callable[[Place], list[tuple[str, ...]]]:
    """A switch: the position it is not in."""
    section, _, name = key.partition(".")

    def turned(place: Place) -> list[tuple[str, ...]]:
        return [(f"{key}={_word(not getattr(getattr(place.config, section), name))}",)]

    return turned


def _others(key: str, values: Sequence[str]) -> Callable[[Place], list[tuple[str, ...]]]:
    """A choice: all values it does not have."""
    section, _, name = key.partition(".")

    def turned(place: Place) -> list[tuple[str, ...]]:
        now = getattr(getattr(place.config, section), name)
        return [(f"{key}={value}",) for value in values if value != ("null" if now is None else str(now))]

    return turned


def _implementations(backend: str, operations: Sequence[str]) -> Callable[[Place], list[tuple[str, ...]]]:
    return lambda place: [tuple(f"kernels.{name}={backend}" for name in operations)]


def _needs_gpu(place: Place) -> str | None:
    return None if place.device == "gpu" else "needs a GPU"


def _needs_copies(place: Place) -> str | None:
    return None if place.layout.data > 1 else "one data-parallel rank: there is nothing to reduce or gather"


def _needs_tensor(place: Place) -> str | None:
    return None if place.layout.tensor > 1 else "one tensor-parallel rank"


def _needs_stages(place: Place) -> str | None:
    if place.layout.pipeline == 1:
        return "one pipeline stage"
    if place.layout.virtual == 1 and place.layout.layers_per_stage % 2:
        return f"{place.layout.layers_per_stage} layers per stage cannot be two chunks"
    return None


def _needs_loader(place: Place) -> str | None:
    return None if place.real_data else "random tokens are on the device already: give --data real"


def _needs_gpu_and_tensor(place: Place) -> str | None:
    return _needs_gpu(place) or _needs_tensor(place)


def _needs_overlap(place: Place) -> str | None:
    if _needs_copies(place) or _overlaps(place)[0]:
        return _needs_copies(place)
    return "gradients are not reduced during the backward pass: set parallel.overlap_grad_reduce"


def _overlaps(place: Place) -> tuple[bool, bool]:
    return place.config.parallel.overlaps(place.layout.data, place.device == "gpu")


def _overlap(reduce: bool, gather: bool) -> list[tuple[str, ...]]:
    return [(f"parallel.overlap_grad_reduce={_word(reduce)}", f"parallel.overlap_param_gather={_word(gather)}")]


def _word(value: bool) -> str:
    return str(value).lower()


def _interleaved(place: Place) -> list[tuple[str, ...]]:
    chunks = "2" if place.layout.virtual == 1 else "null"
    return [(f"parallel.virtual_pipeline_model_parallel_size={chunks}",)]


LEVERS = (
    Lever("fused loss", _toggled("train.fused_loss")),
    Lever("recomputation", _others("train.recompute", ("none", "selective", "full"))),
    Lever("garbage collection between steps", _others("train.gc_interval", ("null", "100"))),
    Lever("read-ahead", lambda place: [()], _needs_loader, read_ahead=False),
    Lever("Triton kernels", _implementations("torch", WITH_KERNELS), _needs_gpu),
    Lever("addition and norm in one", _implementations("torch", ("rms_norm_residual",)), _needs_gpu),
    Lever("torch.compile", _implementations("compile", ELEMENTWISE)),
    Lever("gradients reduced in the backward pass", lambda place: _overlap(not _overlaps(place)[0], False), _needs_copies),
    Lever("weights gathered in the forward pass", lambda place: _overlap(True, not _overlaps(place)[1]), _needs_copies),
    Lever("gradient buckets", _others("parallel.ddp_bucket_size", ("null", "10000000")), _needs_overlap),
    Lever("distributed optimizer", _toggled("parallel.use_distributed_optimizer"), _needs_copies),
    Lever(
        "sequence parallelism",
        lambda place: [(f"parallel.sequence_parallel={_word(not place.layout.sequence_parallel)}",)],
        _needs_tensor,
    ),
    Lever(
        "collectives beside products",
        lambda place: [()],
        _needs_gpu_and_tensor,
        environment=(("CUDA_DEVICE_MAX_CONNECTIONS", "8"),),
    ),
    Lever("interleaved pipeline", _interleaved, _needs_stages),
)


def chosen(text: str) -> list[Lever]:
    """The levers that `text` names, with commas; all of them if it is empty.

    Raises:
        UserError: there is no such lever.
    """
    by_name = {lever.name: lever for lever in LEVERS}
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise UserError(f"--ablations: no lever '{unknown[0]}'; any of these, with commas: {', '.join(by_name)}")
    return [by_name[name] for name in names] if names else list(LEVERS)


def variants(
    path: str, settings: Sequence[str], ranks: int, levers: Sequence[Lever], device: Device, real_data: bool
) -> tuple[list[Variant], list[Refused]]:
    """What can be measured beside the base, and what cannot.

    Args:
        path: the configuration.
        settings: overrides of the base.
        ranks: processes of the base and of each variant.
        levers: to turn.
        device: the variants' device.
        real_data: whether the steps load their data.

    Raises:
        ConfigError: the base itself is impossible.
    """
    config = load_file(Config, path, settings)
    place = Place(config, plan(config, ranks), device, real_data)
    possible: list[Variant] = []
    refused: list[Refused] = []
    for lever in levers:
        reason = lever.why_not(place)
        if reason is not None:
            refused.append(Refused(lever.name, (), reason))
            continue
        for turned in lever.turned(place):
            try:
                plan(load_file(Config, path, [*settings, *turned]), ranks)
            except ConfigError as error:
                refused.append(Refused(lever.name, turned, str(error.problems[0])))
                continue
            possible.append(Variant(lever.name, turned, lever.environment, lever.read_ahead))
    return possible, refused
