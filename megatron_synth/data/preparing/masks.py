"""Which tokens of documents are learned, and the chat template of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import PLAIN_TURNS, PrepareConfig
from megatron_synth.data.preparing.readers.documents import Part
from megatron_synth.data.tokenizer import Tokenizer
from megatron_synth.storage.faults import ObjectMissing
from megatron_synth.storage.objects import read_location
from megatron_synth.storage.remote import location_of

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


def encode(
    tokenizer: Tokenizer, documents: Sequence[tuple[Part, ...]], dtype: np.dtype[Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `Tokenizer.encode`, of documents in parts; and which tokens are learned, bool [T].

    The end of a document is learned where its last part is. A template that ends with it has it once.
    """
    literal = [part.text for parts in documents for part in parts if not part.markup]
    tokens, lengths = tokenizer.encode(literal, dtype)
    pieces = iter(np.split(tokens, np.cumsum(lengths)[:-1]) if literal else ())
    markup = iter(tokenizer.encode_markup([part.text for parts in documents for part in parts if part.markup], dtype))
    found: list[np.ndarray] = []
    learned: list[np.ndarray] = []
    sizes: list[int] = []
    end = np.array([tokenizer.eod_id], dtype)
    for parts in documents:
        own = [next(markup) if part.markup else next(pieces)[:-1] for part in parts]
        counts = [part.learned for part in parts]
        if not (own and parts[-1].markup and own[-1].size and own[-1][-1] == end[0]):
            own.append(end)
            counts.append(parts[-1].learned)
        found += own
        learned += [np.full(one.size, count) for one, count in zip(own, counts, strict=True)]
        sizes.append(sum(one.size for one in own))
    if not documents:
        return np.empty(0, dtype), np.empty(0, np.int32), np.empty(0, np.bool_)
    return np.concatenate(found), np.array(sizes, np.int32), np.concatenate(learned)


def with_templates(config: PrepareConfig, tokenizer: Tokenizer | None) -> PrepareConfig:
    """The settings with the template of each source of chats: that of the tokenizer, where it has one and none is given.

    tokenizer: None where one is trained.

    Raises:
        UserError: the template cannot be read.
    """
    sources = dict(config.sources)
    chats = {name: one.messages for name, one in sources.items() if one.messages is not None and one.messages.turns is None}
    template = chat_template(config) if chats else None
    for name, messages in chats.items():
        update: dict[str, Any] = {}
        if messages.jinja is None and (template is None or tokenizer is None):
            update["turns"] = PLAIN_TURNS
        else:
            if messages.jinja is None and template is not None:
                update["jinja"] = template[0]
            if not messages.tokens and template is not None:
                update["tokens"] = template[1]
            if not messages.special and tokenizer is not None:
                update["special"] = tuple(sorted(tokenizer.special_tokens))
        sources[name] = sources[name].model_copy(update={"messages": messages.model_copy(update=update)})
    return config.model_copy(update={"sources": sources})


def chat_template(config: PrepareConfig) -> tuple[str, dict[str, str]] | None:
    """The chat template of the given tokenizer and the special tokens that it speaks of; None: it has none.

    It is `chat_template.jinja` beside tokenizer.json, or `chat_template` in `tokenizer_config.json`.

    Raises:
        UserError: a file is damaged.
    """
    settings = _read(config, CONFIG)
    about: Any = {}
    if settings is not None:
        try:
            about = json.loads(settings)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{CONFIG} of the tokenizer: broken JSON, {str(error)[:200]}") from None
    template = _read(config, TEMPLATE) or (about.get("chat_template") if isinstance(about, dict) else None)
    if isinstance(template, list):  # several by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        return None
    tokens = {}
    for name in _NAMED:
        token = about.get(name) if isinstance(about, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    return template, tokens


def _read(config: PrepareConfig, name: str) -> str | None:
    """A file beside the tokenizer's; None where there is none."""
    if config.tokenizer.path is not None:
        beside = location_of(config.tokenizer.path, "tokenizer.path")
        if isinstance(beside, Path):
            place: Any = beside.parent / name
        else:
            place = location_of(f"{beside.url.rpartition('/')[0]}/{name}", "tokenizer.path")
        try:
            return read_location(place).decode("utf-8")
        except (FileNotFoundError, ObjectMissing):
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{place}: {error}; expected the settings of the tokenizer, in UTF-8") from None
    if config.tokenizer.name is None:
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(config.tokenizer.name, name)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return None
    except Exception as error:  # network and login: the library has no common base
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"tokenizer.name {config.tokenizer.name!r}: cannot fetch its {name} ({reason})") from None
