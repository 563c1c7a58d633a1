"""Downstream tasks by lm-evaluation-harness, on a folder in Hugging Face's format.

A task is a YAML file of the harness: its data, its prompt, its metrics. Those of the harness fetch their data from the Hugging
Face Hub, or take it from its cache; those in a folder of one's own may read local files. A task file may name Python
functions: the folder is trusted as a program is.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import UserError

Results = dict[str, dict[str, float]]
"""Metrics by task, each with its number: `acc`, `acc_stderr` and so on."""


def run_tasks(
    folder: Path,
    tasks: Sequence[str],
    *,
    own: Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    seed: int = 1234,
) -> Results:
    """Evaluate a model on tasks.

    Args:
        folder: the model with its tokenizer.
        tasks: names of tasks or of groups of them.
        own: a folder with task files, beside those of the harness.
        few_shot: examples in front of each question. Default: as the task says.
        limit: questions of each task, from its beginning. Default: all.
        batch_size: questions at a time.
        device: cpu, cuda, or auto for a GPU where there is one.
        seed: of the choice of examples.

    Returns:
        Every metric that is a number, by task, filters of the harness in the name where a task has several.

    Raises:
        UserError: the harness is not installed, a task is unknown, or its data cannot be had.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--tasks: lm-evaluation-harness is not installed ({error}); pip install 'megatron-synth[tasks]'"
        ) from None
    import torch

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it forks after they were used
    manager = TaskManager(include_path=None if own is None else str(own))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        import difflib

        close = difflib.get_close_matches(unknown[0], manager.all_tasks, 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; --task-path names a folder with tasks of your own"
        raise UserError(f"--tasks: no task {', '.join(unknown)} in lm-evaluation-harness{f' or {own}' if own else ''}{hint}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    said = io.StringIO()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(said):
            model = HFLM(pretrained=str(folder), device=device, batch_size=batch_size, trust_remote_code=False)
            found = simple_evaluate(
                model,
                tasks=list(tasks),
                num_fewshot=few_shot,
                limit=limit,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=1000,  # of metrics without a formula for their error
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except Exception as error:  # of the hub, of data, of the task's own code: no common base
        reason = " ".join(str(error).split())[:500]
        raise UserError(
            f"--tasks: {', '.join(tasks)} cannot be evaluated: {type(error).__name__}: {reason}. Offline, tasks need their "
            "data in the cache of Hugging Face (HF_HOME, filled on a machine with a network), or local files (--task-path)"
        ) from error
    return {name: metrics for name, values in found["results"].items() if (metrics := _numbers(values))}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Metrics of one task: the harness calls them `metric,filter`."""
    filters = {name.partition(",")[2] for name in values if "," in name}
    kept = {}
    for name, value in values.items():
        metric, comma, filter_name = name.partition(",")
        if comma and isinstance(value, int | float) and math.isfinite(value):
            kept[metric if len(filters) == 1 else f"{metric}@{filter_name}"] = float(value)
    return kept
