"""What comes with a Llama of Hugging Face beside weights and architecture, and goes along through training into the export.

Special tokens, settings of generation and of the tokenizer, the chat template: kept as `huggingface.json` beside the
checkpoints of what was imported, copied into the run directories that start from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_synth.config.errors import UserError
from megatron_synth.config.section import Section
from megatron_synth.core.files import write_json

FILE = "huggingface.json"
_SETTINGS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_TEMPLATE = "chat_template.jinja"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Special tokens, by their keys in config.json."""
_CODE = ("auto_map",)
"""Settings that name Python files of the model's author, which are not taken along."""


class Companions(Section):
    """What goes along, by the names of Hugging Face."""

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    max_position_embeddings: int | None = None
    """Longest text that the model was said to read, in tokens."""
    settings: dict[str, dict[str, Any]] = {}
    """Contents of the JSON files, by name."""
    chat_template: str | None = None
    """Content of chat_template.jinja; older models have it in tokenizer_config.json."""

    @property
    def ends(self) -> list[int]:
        """Tokens that end a text; empty if none is known."""
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else self.eos_token_id

    def save(self, folder: Path) -> None:
        """Write `folder`/huggingface.json."""
        write_json(folder / FILE, self.model_dump(mode="json"))

    def files(self) -> dict[str, dict[str, Any] | str]:
        """What to write beside the weights: contents by file name."""
        found: dict[str, dict[str, Any] | str] = {name: self.settings[name] for name in _SETTINGS if name in self.settings}
        if self.chat_template is not None:
            found[_TEMPLATE] = self.chat_template
        return found


def collect(folder: Path, config: dict[str, Any]) -> Companions:
    """What a Hugging Face folder has of it. config: its config.json.

    Raises:
        UserError: a file is not what its name says.
    """
    settings: dict[str, Any] = {}
    for name in _SETTINGS:
        content = _read(folder / name)
        if content is not None:
            settings[name] = {key: value for key, value in content.items() if key not in _CODE}
    template = folder / _TEMPLATE
    try:
        text = template.read_text(encoding="utf-8") if template.is_file() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{template}: cannot be read ({error}); download or copy it again") from None
    ids = {name: config.get(name) for name in (*IDS, "max_position_embeddings")}
    return _checked(folder / "config.json", {**ids, "settings": settings, "chat_template": text})


def load(folder: Path) -> Companions | None:
    """`folder`/huggingface.json; None if there is none. UserError if it is damaged."""
    content = _read(folder / FILE)
    return None if content is None else _checked(folder / FILE, content)


def _checked(file: Path, content: dict[str, Any]) -> Companions:
    try:
        found = Companions.model_validate(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    unknown = sorted(set(found.settings) - set(_SETTINGS))
    if unknown:
        raise UserError(f"{file}: settings: expected {', '.join(_SETTINGS)}, found {unknown[0]!r:.120}")
    return found


def _read(file: Path) -> dict[str, Any] | None:
    if file.is_symlink() and file.name == FILE:
        raise UserError(f"{file}: is a link, expected a file of the run's own")
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); download or copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected settings by name, found {type(content).__name__}")
    return content
