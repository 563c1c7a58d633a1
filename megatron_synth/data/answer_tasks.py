"""Task files of lm-evaluation-harness, as far as they say what is asked: templates for context, choices and the right answer.

Read as data: what a task file would run (`!function`), download or sample for few-shot examples is refused by its key.
Templates run in a sandbox with a limit of steps.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_synth.config import yaml12
from megatron_synth.config.errors import UserError
from megatron_synth.core.files import read_regular

_REFUSED = ("process_docs", "process_results", "include", "gen_prefix", "use_prompt", "doc_to_image", "doc_to_audio", "class")
_TYPES = ("multiple_choice", "loglikelihood", "generate_until")


@dataclass(frozen=True)
class Task:
    """What a task makes of a row."""

    where: str
    text: Any
    target: Any
    choice: Any
    description: str
    delimiter: str

    @classmethod
    def read(cls, path: Path) -> Task:
        """Read a task file.

        Raises:
            UserError: names the key that is missing, or that cannot be followed here.
        """
        try:
            content = read_regular(path).decode("utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: is not text in UTF-8") from None
        if "!function" in content:
            raise UserError(
                f"{path}: names Python code (!function), which is not run here; make its rows and their answers a .jsonl"
            )
        task = yaml12.parse(content, str(path))
        if not isinstance(task, dict):
            raise UserError(f"{path}: expected a task of lm-evaluation-harness, found no mapping")
        for key in _REFUSED:
            if task.get(key) not in (None, False, ""):
                raise UserError(f"{path}: {key}: cannot be followed here; make its rows and their answers a .jsonl")
        if task.get("num_fewshot"):
            raise UserError(
                f"{path}: num_fewshot: {task['num_fewshot']}: examples are not put before the questions; set it to 0"
            )
        if (kind := task.get("output_type", "generate_until")) not in _TYPES:
            raise UserError(f"{path}: output_type: {kind!r} has no answers with a likelihood; one of {', '.join(_TYPES)}")
        for key in ("doc_to_text", "doc_to_target"):
            if not isinstance(task.get(key), (str, int)):
                raise UserError(f"{path}: {key}: expected a field or a template")
        choice = task.get("doc_to_choice")
        if not isinstance(choice, (str, list, type(None))) or (kind == "multiple_choice" and choice is None):
            raise UserError(f"{path}: doc_to_choice: expected a field, a template or a list")
        texts = {key: task.get(key, default) for key, default in (("description", ""), ("target_delimiter", " "))}
        for key, text in texts.items():
            if not isinstance(text, str):
                raise UserError(f"{path}: {key}: expected text")
        return cls(
            str(path), task["doc_to_text"], task["doc_to_target"], choice, texts["description"], texts["target_delimiter"]
        )

    def question(self, row: dict[str, Any]) -> tuple[str, tuple[str, ...], int]:
        """Context, answers with their delimiter, and the number of the right one.

        Raises:
            ValueError: the templates make no question of the row; says why.
        """
        context = self.description + str(self._of(self.text, row))
        target = self._of(self.target, row)
        if self.choice is None:
            return context, (f"{self.delimiter}{target}",), 0
        choices = self._choices(row)
        if isinstance(target, str) and target in choices:
            target = choices.index(target)
        if isinstance(target, str) and target.strip().isdecimal():
            target = int(target)
        if not isinstance(target, int) or not 0 <= target < len(choices):
            raise ValueError(f"{self.where}: doc_to_target makes {target!r:.60}, which is none of the {len(choices)} choices")
        return context, tuple(f"{self.delimiter}{choice}" for choice in choices), target

    def _choices(self, row: dict[str, Any]) -> list[str]:
        found = self.choice
        if isinstance(found, str):
            found = self._of(found, row)
            if isinstance(found, str):
                try:
                    found = ast.literal_eval(found)
                except (ValueError, SyntaxError, RecursionError, MemoryError):
                    raise ValueError(f"{self.where}: doc_to_choice makes {found!r:.60}, which is no list") from None
        if not isinstance(found, list) or len(found) < 2 or not all(isinstance(one, (str, int)) for one in found):
            raise ValueError(f"{self.where}: doc_to_choice makes no list of choices")
        return [str(one) for one in found]

    def _of(self, template: Any, row: dict[str, Any]) -> Any:
        """A field of the row where the template is its name, else the template applied to the row."""
        if not isinstance(template, str):
            return template
        if template in row:
            return row[template]
        environment = _environment()
        environment.begin()
        try:
            return environment.from_string(template).render(**{str(key): value for key, value in row.items()})
        except Exception as error:  # a template may fail in any way
            raise ValueError(f"{self.where}: the template {template!r:.60} cannot be applied: {error}") from None


@cache
def _environment() -> Any:
    """The sandbox of all templates, which is made once."""
    import jinja2

    from megatron_synth.data.counted_jinja import CountedEnvironment

    return CountedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
