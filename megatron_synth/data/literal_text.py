"""A tokenizer.json changed so that text which spells a special token is encoded as text.

`tokenizers` can be told to look for no special tokens in the text, but three ways to them are left: an added token that
is not marked as special; a model that takes a whole word from its vocabulary (WordLevel, WordPiece, Unigram, BPE with
`ignore_merges`); and a merge of BPE that makes one. Here the token that ends a document is marked, and the model's
own entries for special tokens get names that no text holds. Ids stay what they were.
"""

from __future__ import annotations

import json
from typing import Any

_UNREACHABLE = "\ufdd0special-{}\ufdd1"  # noncharacters: no text has them


def read_literally(content: str, eod: str) -> str:
    """The tokenizer.json to encode with, given the one to keep; the same where nothing has to change."""
    data: dict[str, Any] = json.loads(content)
    model, added = data.get("model") or {}, data.get("added_tokens") or []
    changed = False
    for token in added:
        if token["content"] == eod and not token["special"]:
            token["special"] = changed = True
    special = {token["content"] for token in added if token["special"]} | {eod}
    special -= {model.get("unk_token")}  # which the model looks up by its name
    renamed = _rename(model, special)
    if not changed and not renamed:
        return content
    # without its entry such a token would get another id; those beyond the model's vocabulary keep theirs by their order
    data["added_tokens"] = [token for token in added if token["content"] not in renamed]
    return json.dumps(data, ensure_ascii=False)


def _rename(model: dict[str, Any], special: set[str]) -> set[str]:
    """Give special tokens that the model can make of text names that no text holds; which were given one."""
    vocab, kind = model.get("vocab"), model.get("type")
    if isinstance(vocab, list):  # Unigram: [piece, score] in the order of the ids
        places = [at for at, (piece, _) in enumerate(vocab) if piece in special and at != model.get("unk_id")]
        found = {vocab[at][0] for at in places}
        for at in places:
            vocab[at][0] = _UNREACHABLE.format(at)
        return found
    if not isinstance(vocab, dict):
        return set()
    merges = model.get("merges") or []
    made = {"".join(_pair(merge)) for merge in merges} & special
    whole_words = kind != "BPE" or model.get("ignore_merges")
    # of a single character there is no other way to be text: a document that holds it is refused
    inside = {token for token in special if token in vocab and len(token) > 1 and (whole_words or token in made)}
    if made:
        model["merges"] = [merge for merge in merges if not made & {"".join(_pair(merge)), *_pair(merge)}]
    model["vocab"] = {_UNREACHABLE.format(number) if token in inside else token: number for token, number in vocab.items()}
    return inside


def _pair(merge: Any) -> list[str]:
    """The two halves of a merge, which older files write as one string."""
    return merge if isinstance(merge, list) else merge.split(" ", 1)
