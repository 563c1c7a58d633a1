"""Documents of which a part is read and not learned: a prompt before its answer, turns of a chat.

A document is made of parts that are tokenized one by one, so that what is learned begins with a token. A chat template is run
in a sandbox with a limit of steps (counted_jinja.py). What a message adds is what the template makes of the
messages up to it, less what it makes of those before: of an answer, less the header that asks for one, too. Templates that
change what came before when a message follows are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import MessagesConfig, PrepareSource
from megatron_synth.data.preparing.readers.documents import BadRecord, Document, Part, checked_text
from megatron_synth.data.preparing.readers.values import values_of

MAX_MESSAGES = 10_000


def document_of(source: PrepareSource, record: Mapping[str, Any], where: object) -> Document:
    """The document of a record.

    Raises:
        BadRecord: it has none, or values of its columns are not of their types.
    """
    messages = source.messages
    if messages is not None and record.get(messages.field) is not None:
        parts = _chat(messages, record[messages.field], where)
    elif source.text_key not in record:
        fields = source.text_key if messages is None else f"{messages.field!r} or {source.text_key!r}"
        raise BadRecord(
            f"{where}: no field {fields!s}, found {sorted(map(str, record))}; set text_key to the field of the text"
        )
    else:
        text, prompt = checked_text(record[source.text_key], where, source.text_key), source.prompt
        found = None if prompt is None else record.get(prompt.field)
        if prompt is None or found is None:
            return _document(source, record, text, None, where)
        parts = (Part(prompt.before + checked_text(found, where, prompt.field) + prompt.after, False), Part(text, True))
    if not any(part.learned and part.text.strip() for part in parts):
        return Document("", "")
    return _document(source, record, "".join(part.text for part in parts), parts, where)


def _document(
    source: PrepareSource, record: Mapping[str, Any], text: str, parts: tuple[Part, ...] | None, where: object
) -> Document:
    columns = source.columns
    return Document(text, text, values_of(columns, record, text, where) if columns else None, parts)


def _chat(settings: MessagesConfig, found: Any, where: object) -> tuple[Part, ...]:
    """The parts of a chat."""
    if not isinstance(found, list) or not all(isinstance(one, Mapping) and isinstance(one.get("role"), str) for one in found):
        raise BadRecord(f"{where}: {settings.field!r} holds no list of messages with `role` and `content`, {found!r:.80}")
    if len(found) > MAX_MESSAGES:
        raise BadRecord(f"{where}: {len(found)} messages, at most {MAX_MESSAGES} make a document; split it")
    return _templated(settings, found, where) if settings.jinja is not None else _plain(settings, found, where)


def _plain(settings: MessagesConfig, messages: list[Mapping[str, Any]], where: object) -> tuple[Part, ...]:
    turns, parts = settings.turns or {}, []
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in turns:
            raise BadRecord(
                f"{where}: message {number} has the role {role!r:.80}; name it in messages.turns: {', '.join(turns)}"
            )
        before, after = turns[role]
        content = checked_text(message.get("content"), f"{where}, message {number}", "content")
        learned = role in settings.learned
        parts += [Part(before, False), Part(content + after, True)] if learned else [Part(before + content + after, False)]
    return tuple(parts)


def _templated(settings: MessagesConfig, messages: list[Mapping[str, Any]], where: object) -> tuple[Part, ...]:
    for number, message in enumerate(messages):
        for text in _texts(message):
            checked_text(text, f"{where}, message {number}", "content")
            spelled = next((token for token in settings.special if token in text), None)
            if spelled is not None:
                raise BadRecord(
                    f"{where}: message {number} spells the special token {spelled!r}, which the template would make of it; "
                    "change the text, or set on_error to skip"
                )
    parts, done = [], ""
    for number, message in enumerate(messages):
        if message["role"] in settings.learned:
            header = _rendered(settings, messages[:number], where, answer=message["role"] == "assistant")
            parts.append(Part(_after(done, header, number, where), False, markup=True))
            done = header
        whole = _rendered(settings, messages[: number + 1], where)
        parts.append(Part(_after(done, whole, number, where), message["role"] in settings.learned, markup=True))
        done = whole
    return tuple(part for part in parts if part.text)


def _after(before: str, whole: str, number: int, where: object) -> str:
    if not whole.startswith(before):
        raise BadRecord(
            f"{where}: the chat template changes the text before message {number} when that follows, so that what is learned "
            "cannot be told; give another template as messages.jinja, or messages.turns"
        )
    return whole[len(before) :]


def _rendered(settings: MessagesConfig, messages: list[Mapping[str, Any]], where: object, *, answer: bool = False) -> str:
    """What the template makes of messages. answer: with the header of an answer. Nothing for nothing."""
    assert settings.jinja is not None
    if not messages and not answer:
        return ""
    try:
        from megatron_synth.data.counted_jinja import TooManySteps
        from megatron_synth.data.preparing.readers.chat_template import template_of
    except ImportError as error:
        raise UserError(
            f"messages: chat templates need the packages of megatron-synth[synthesis] ({error.name} is missing)"
        ) from None
    try:
        text = template_of(settings.jinja).render(messages, answer=answer, tokens=settings.tokens)
    except TooManySteps as error:
        raise BadRecord(
            f"{where}: the chat template takes too long for {len(messages)} messages: {error}; give another template as "
            "messages.jinja, or messages.turns, or shorten the document"
        ) from None
    except Exception as error:  # a template may fail in any way
        raise BadRecord(f"{where}: the chat template refuses it: {str(error)[:200]}") from None
    return checked_text(text, where, settings.field)


def _texts(value: Any) -> list[str]:
    """All texts in a message."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for one in value.values() for text in _texts(one)]
    return [text for one in value for text in _texts(one)] if isinstance(value, list) else []
