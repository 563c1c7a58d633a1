"""Prompts and chats: which tokens are learned, from records to shards, the same for every way that they take."""

import json
import time

import numpy as np
import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import PLAIN_TURNS, PrepareConfig
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.data.preparing.readers.chat_template import template_of
from megatron_synth.data.shards.manifest import Manifest
from megatron_synth.data.shards.source import open_source
from megatron_synth.data.tokenizer import load_tokenizer
from tests.unit.data.preparing.support import EOD, SHUFFLED_AND_PACKED, TEXTS, lengths_of, tree

CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def pairs():
    """Records with a prompt, without one, and with an empty answer."""
    found = [{"question": f"What is {n}? ", "text": text} for n, text in enumerate(TEXTS)]
    for number in range(0, len(found), 5):
        del found[number]["question"]
    return [*found, {"question": "And then?", "text": "  "}, {"question": None, "text": "nothing before it"}]


def chats():
    """Chats of one to three turns, and a text among them."""
    found = []
    for number, text in enumerate(text for text in TEXTS[:30] if EOD not in text):
        turns = [{"role": "system", "content": "Be brief."}] if number % 4 == 0 else []
        for turn in range(number % 3 + 1):
            turns += [{"role": "user", "content": f"{turn}: {text}"}, {"role": "assistant", "content": text[::-1]}]
        found.append({"messages": turns[: len(turns) - (number % 7 == 3)]})
    return [*found, {"text": "no chat at all"}, {"messages": [{"role": "user", "content": "nobody answers"}]}]


def write(folder, records, ending=".jsonl"):
    path = folder / f"rows{ending}"
    if ending == ".parquet":
        import pyarrow
        from pyarrow import parquet

        keys = dict.fromkeys(key for record in records for key in record)
        table = pyarrow.Table.from_pylist([dict.fromkeys(keys) | record for record in records])
        parquet.write_table(table, path, row_group_size=17)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def stored(folder):
    """Of each document its tokens and which of them are learned; padding is none."""
    source = open_source(folder, "web")
    tokens, learned = np.empty(source.num_tokens, np.int64), np.empty(source.num_tokens, np.bool_)
    source.read(0, tokens)
    source.read_learned(0, learned)
    assert source.manifest.learned_tokens == learned.sum()
    edges = np.cumsum(lengths_of(source))[:-1]
    both = zip(np.split(tokens, edges), np.split(learned, edges), strict=True)
    return [(one.tolist(), mask.tolist()) for one, mask in both if len(one) > 1 or mask.any()]


def expected_of(tokenizer, parts):
    """Tokens and learned of a document, each part encoded alone."""
    tokens, learned = [], []
    for text, counts in parts:
        ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
        tokens += ids
        learned += [counts] * len(ids)
    return [*tokens, tokenizer.eod_id], [*learned, parts[-1][1]]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_answers_are_learned_and_prompts_are_not(make, tmp_path, tokenizer_path, ending):
    prompt = {"field": "question", "before": "Q: ", "after": "\nA: "}
    prepare(make({"input": write(tmp_path, pairs(), ending), "prompt": prompt}))
    tokenizer = load_tokenizer(tokenizer_path, EOD)
    expected = []
    for record in pairs():
        if record.get("question") is None:
            expected.append(expected_of(tokenizer, [(record["text"], True)]))
        elif record["text"].strip():
            expected.append(expected_of(tokenizer, [(f"Q: {record['question']}\nA: ", False), (record["text"], True)]))
    assert stored(tmp_path / "out" / "web") == expected
    assert any(not all(mask) for _, mask in expected) and any(all(mask) for _, mask in expected)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_turns_of_the_learned_roles_are_learned(make, tmp_path, tokenizer_path, ending):
    prepare(make({"input": write(tmp_path, chats(), ending), "messages": "messages"}))
    tokenizer, expected = load_tokenizer(tokenizer_path, EOD), []
    for record in chats():
        parts = [] if record.get("messages") else [(record["text"], True)]
        for message in record.get("messages") or ():
            before, after = PLAIN_TURNS[message["role"]]
            learned = message["role"] == "assistant"
            content = message["content"] + after
            parts += [(before, False), (content, True)] if learned else [(before + content, False)]
        if any(learned for _, learned in parts):
            expected.append(expected_of(tokenizer, parts))
    assert stored(tmp_path / "out" / "web") == expected


@pytest.mark.parametrize("settings", [{}, SHUFFLED_AND_PACKED, {"shuffle": {"seed": 5}}, {"packing": {"sequence_length": 64}}])
def test_masks_go_where_their_tokens_go(make, tmp_path, settings):
    source = {"input": write(tmp_path, pairs()), "prompt": "question"}
    prepare(make(source, output=str(tmp_path / "plain")))
    prepare(make(source, **settings, shard_tokens=700))
    folder = tmp_path / "out" / "web"
    plain, found = stored(tmp_path / "plain" / "web"), stored(folder)
    if "packing" not in settings:
        assert sorted(found) == sorted(plain)
    else:  # documents longer than a window are cut; padding is not learned
        learned = [token for one in (found, plain) for token in [sum(map(sum, (mask for _, mask in one)))]]
        assert learned[0] == learned[1]
        whole = {tuple(tokens): mask for tokens, mask in plain}
        assert all(whole[tuple(tokens)] == mask for tokens, mask in found if tuple(tokens) in whole)
    manifest = Manifest.load(folder)
    assert manifest.masked and len(manifest.shards) > 1
    again = tmp_path / "again"
    prepare(make(source, **settings, shard_tokens=700, output=str(again)), workers=2)
    assert tree(again / "web") == tree(folder)


def test_a_limit_cuts_masks_with_their_documents(make, tmp_path):
    source = {"input": write(tmp_path, pairs()), "prompt": "question"}
    prepare(make(source, output=str(tmp_path / "plain")))
    prepare(make({**source, "max_bytes": 900}))
    plain, found = stored(tmp_path / "plain" / "web"), stored(tmp_path / "out" / "web")
    assert 3 < len(found) < len(plain) and found == plain[: len(found)]


@pytest.fixture
def chat_tokenizer(tmp_path, tokenizer_path):
    """The tokenizer with the tokens of a chat template, and the template beside it."""
    from tokenizers import Tokenizer

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    backend = Tokenizer.from_file(str(tokenizer_path))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOD, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_chat_template_gives_the_tokens_that_transformers_gives(make, tmp_path, chat_tokenizer):
    from transformers import PreTrainedTokenizerFast

    path = str(chat_tokenizer / "tokenizer.json")
    prepare(make({"input": write(tmp_path, chats()), "messages": "messages"}, tokenizer={"path": path}))
    witness = PreTrainedTokenizerFast.from_pretrained(chat_tokenizer)
    end, begin = (witness.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|im_start|>"))
    header = witness("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    expected = []
    for record in chats():
        messages = record.get("messages")
        if messages is None or all(message["role"] != "assistant" for message in messages):
            continue
        tokens = witness.apply_chat_template(messages, tokenize=True, return_dict=False)
        learned = [False] * len(tokens)
        for at, token in enumerate(tokens):
            if token == begin and tokens[at : at + len(header)] == header:
                after = tokens.index(end, at) + 2  # with the end of the line
                learned[at + len(header) : after] = [True] * (after - at - len(header))
        expected.append(([*tokens, witness.eos_token_id], [*learned, messages[-1]["role"] == "assistant"]))
    found = stored(tmp_path / "out" / "web")
    assert found[: len(expected)] == expected and len(found) == len(expected) + 1


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "say <|im_end|>"}, {"role": "assistant", "content": "no"}], "spells the special token"),
        ([{"role": "user", "content": 5}, {"role": "assistant", "content": "no"}], "message 0|template refuses"),
        ([{"role": "user"}, {"role": "assistant", "content": "no"}], "template refuses"),
        ("text", "no list of messages"),
        ([{"content": "x"}], "no list of messages"),
    ],
)
def test_chats_that_are_none_are_bad_records(make, tmp_path, chat_tokenizer, messages, message):
    path = str(chat_tokenizer / "tokenizer.json")
    rows = [*chats()[:2], {"messages": messages}]
    source = {"input": write(tmp_path, rows), "messages": "messages"}
    with pytest.raises(UserError, match=rf"rows.jsonl, line 3: .*({message})"):
        prepare(make(source, tokenizer={"path": path}))
    (prepared,) = prepare(make({**source, "on_error": "skip"}, tokenizer={"path": path}))
    assert len(prepared.skipped) == 1 and prepared.manifest.counts.documents == 2


def test_a_template_that_changes_what_came_before_is_refused(make, tmp_path, chat_tokenizer):
    settings = json.loads((chat_tokenizer / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ messages | length }}" + CHATML
    (chat_tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    path = str(chat_tokenizer / "tokenizer.json")
    with pytest.raises(UserError, match="changes the text before message"):
        prepare(make({"input": write(tmp_path, chats()), "messages": "messages"}, tokenizer={"path": path}))


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 // 0 }}",
        "{{ '{}'.format() }}",
        "{{ strftime_now('%99999d' * 100000) }}",
        "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,  # more than Python nests
    ],
)
def test_a_template_that_fails_in_any_way_refuses_its_record(make, tmp_path, chat_tokenizer, template):
    refused_by(template, make, tmp_path, chat_tokenizer)


def test_a_template_cannot_reach_the_interpreter(make, tmp_path, chat_tokenizer):
    refused_by("{{ ''.__class__.__mro__[1].__subclasses__() }}", make, tmp_path, chat_tokenizer)


def refused_by(template, make, tmp_path, chat_tokenizer):
    settings = json.loads((chat_tokenizer / "tokenizer_config.json").read_text())
    settings["chat_template"] = template + CHATML
    (chat_tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    path = str(chat_tokenizer / "tokenizer.json")
    with pytest.raises(UserError, match=r"rows.jsonl, line 1: the chat template refuses it"):
        prepare(make({"input": write(tmp_path, chats()), "messages": "messages"}, tokenizer={"path": path}))


BIG = "{% set big = 'x' * 900000 %}{% set big = big ~ big ~ big ~ big %}"
HOSTILE = {
    "loops": "{% for a in range(1000) %}" * 4 + "{% endfor %}" * 4,
    "conditions": "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "recursion": "{% for a in range(99999) recursive %}{% if loop.depth < 9 %}{{ loop(range(99999)) }}{% endif %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filters": "{% for a in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
    "doubling": "{% set n = namespace(x='x') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "output": BIG + "{% for a in range(99999) %}{{ big }}{% endfor %}",
    "slices": BIG + "{% for a in range(99999) %}{% set x = big[::-1] %}{% endfor %}",
    "comparisons": BIG + "{% set x = big[1:] ~ 'x' %}{% for a in range(99999) %}{% set y = x == big %}{% endfor %}",
    "repetition": "{{ 'x' * 10 ** 10 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "center": "{{ 'x'.center(10000000000) }}{{ 'x' | center(10000000000) }}",
    "format": "{{ '%9999999999d' % 1 }}",
    "format filter": "{{ '%*d' | format(9999999999, 1) }}",
    "format method": "{{ '{:{}}'.format(1, 9999999999) }}",
    "replace": BIG + "{{ big.replace('x', big) }}",
    "join": BIG + "{{ range(99999) | map('string') | join(big) }}",
    "round": "{{ 1.5 | round(999999999, 'ceil') }}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_without_an_end_is_refused_soon(make, tmp_path, chat_tokenizer, kind):
    settings = json.loads((chat_tokenizer / "tokenizer_config.json").read_text())
    settings["chat_template"] = HOSTILE[kind] + CHATML
    (chat_tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    path, start = str(chat_tokenizer / "tokenizer.json"), time.process_time()
    with pytest.raises(
        UserError, match=r"rows.jsonl, line 1: the chat template takes too long for \d messages: .* messages.jinja"
    ):
        prepare(make({"input": write(tmp_path, chats()), "messages": "messages"}, tokenizer={"path": path}))
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{%- for m in messages if m.role != 'tool' %}{%- if loop.first and not loop.last %}{{ loop.length }}{%- endif %}"
        "{%- set text = m.content | trim %}{{- m['role'] | upper ~ ': ' ~ text[:5] ~ text[5:] + '%5s' % 'x' }}"
        "{%- if loop.index0 % 2 == 0 %}{%- continue %}{%- endif %}{{ {'a': [m.role, 1]} | tojson(indent=2) }}{%- endfor %}",
        "{%- macro turn(m) -%}<{{ m.role }}>{{ m.content.split('quick')[-1] }}{%- endmacro %}{%- set ns = namespace(n=0) %}"
        "{%- for m in messages[::-1] %}{%- set ns.n = ns.n + 1 %}{% generation %}{{ turn(m) }}{{ ns.n }}{% endgeneration %}"
        "{%- else %}none{%- endfor %}{{ bos_token }}{{ 'yes' if tools is none and add_generation_prompt else 'no' }}",
        "{%- for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content is string }}\n {% endfor %} {{ x }}\n",
    ],
)
def test_templates_make_what_transformers_makes_of_them(template):
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [
        [*one["messages"], {"role": "assistant", "content": "a", "thinking": "b"}] for one in chats() if "messages" in one
    ]
    expected, _ = render_jinja_template(messages, chat_template=template, add_generation_prompt=True, bos_token="<s>")
    template = template_of(template)
    assert [template.render(one, answer=True, tokens={"bos_token": "<s>"}) for one in messages] == expected


def test_a_template_that_asks_for_the_day_gets_the_same_one():
    assert template_of("{{ strftime_now('%d %b %Y') }}").render([], answer=False, tokens={}) == "26 Jul 2024"


def test_another_template_makes_another_output(make, tmp_path, chat_tokenizer):
    path = str(chat_tokenizer / "tokenizer.json")
    config = make({"input": write(tmp_path, chats()), "messages": "messages"}, tokenizer={"path": path})
    prepare(config)
    assert prepare(config) is None
    (chat_tokenizer / "tokenizer_config.json").unlink()
    (chat_tokenizer / "chat_template.jinja").write_text(CHATML.replace("message.content", "message.content | trim"))
    with pytest.raises(UserError, match="prepared from other settings"):
        prepare(config)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"input": "x.jsonl", "prompt": "a", "messages": "b"}, "drop one of `prompt` and `messages`"),
        ({"builtin": "qa", "prompt": "a"}, "are of records"),
        ({"input": "x.jsonl", "prompt": "a", "fim": {"share": "1/2"}}, "drop one of `fim`"),
        ({"input": "x.jsonl", "messages": {"learned": ["robot"], "turns": {"user": ["", ""]}}}, "'robot' is no role of turns"),
        ({"input": "x.jsonl", "messages": {"jinja": "x", "turns": {"user": ["", ""]}}}, "drop one of turns and jinja"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig.model_validate({"output": "o", "tokenizer": {"path": "t"}, "sources": {"w": {"kind": "qa", **source}}})


@pytest.mark.parametrize("source", [{"prompt": "qestion"}, {"messages": {"learned": ["user"], "turns": {"user": ["", ""]}}}])
def test_a_field_that_no_record_has_is_refused(make, tmp_path, source):
    with pytest.raises(UserError, match=r"sources.web.(prompt|messages).field: no document has a part that is not learned"):
        prepare(make(source))


def test_sources_without_prompts_are_written_as_before(make, tmp_path):
    prepare(make())
    folder = tmp_path / "out" / "web"
    assert "learned" not in (folder / "manifest.json").read_text() and not list(folder.glob("*.learned"))
