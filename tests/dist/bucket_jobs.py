"""What ranks run in the tests of object storage: they are forked from a server that knows nothing of the store."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.dist.jobs import rank


def train(arguments: list[str], environment: Mapping[str, str], killed_at: str = "") -> int:
    """`megatron-synth train`; rank 0 kills itself before it uploads the manifest of the checkpoint `killed_at`.

    Or of one after it: where uploads are slow one is left out for the next.
    """
    os.environ.update(environment)
    from megatron_synth.cli import main as cli
    from megatron_synth.storage import objects

    upload = objects.upload

    def fatal(path: Path, place: Any) -> None:
        if killed_at and rank() == 0 and place.name == "manifest.json" and path.parent.name >= killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        upload(path, place)

    objects.upload = fatal
    return cli.main(arguments)
