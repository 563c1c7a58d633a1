"""Templates of strangers: what takes time or memory without an end is refused, and what templates of models do is not."""

import time

import jinja2
import pytest

from megatron_synth.data.counted_jinja import CountedEnvironment, TooManySteps

BIG = "{% set big = 'x' * 1000000 %}"
NESTED = (
    "{% set n = namespace(x='x', y='x') %}{% for a in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}"
)
DEEP = (
    "{% set n = namespace(x='x') %}{% for a in [1, 2] %}{% for b in range(60000) %}"
    "{% set n.x = (n.x,) %}{% endfor %}{% endfor %}"
)
MANY = "{% set many = range(90000) | list %}{% for a in range(90000) %}"
HOSTILE = {
    # little that holds much
    "output": NESTED + "{{ n.x }}",
    "concatenation": NESTED + "{% set y = n.x ~ '' %}",
    "string": NESTED + "{% set y = n.x | string %}",
    "equality": NESTED + "{{ n.x == n.y }}",
    "proxy": "{% set n = namespace(x={'a': 1}) %}{% for a in range(60) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}"
    "{{ n.x.keys().mapping }}",
    "hash of a literal": DEEP + "{% set y = {n.x: 1} %}",
    "hash of a key": DEEP + "{{ {}.get(n.x) }}{{ {}[n.x] }}",
    "join": BIG + "{{ ([big] * 90000) | join }}",
    "join method": BIG + "{{ ''.join([big] * 90000) }}",
    "join of what comes one by one": BIG + "{{ range(90000) | map(attribute='q', default=big) | join }}",
    "join of a loop": BIG + "{% for x in [big] * 90000 %}{{ loop | join }}{% endfor %}",
    "sort": BIG + "{{ ([big] * 90000) | sort | length }}",
    "groupby": BIG + "{{ ([{}] * 90000) | groupby('a', default=big) | length }}",
    "sum": "{{ ([[1] * 90000] * 90000) | sum(start=[]) | length }}",
    "replace in a list": BIG + "{{ [big] | replace('x', big) }}",
    # formats
    "fields": BIG + "{{ ('{0}' * 300000).format(big) }}",
    "fields of a mapping": BIG + "{{ ('{a}' * 300000).format_map({'a': big}) }}",
    "fields of %": BIG + "{{ ('%(a)s' * 200000) % {'a': big} }}",
    "fields of the filter": BIG + "{{ ('%(a)s' * 200000) | format(a=big) }}",
    "widths": "{{ ('{0:99999}' * 100000).format(1) }}",
    "indent of JSON": "{{ ([1] * 60000) | tojson(indent=1000000) }}",
    "digits": "{% for a in range(1000) %}{% set y = 1 | round(1000000, 'floor') %}{% endfor %}",
    "hexadecimal": "{% set y = ('f' * 1000000) | int(base=16) %}",
    # what a template writes out or does without a call
    "constant": "{% for a in range(90000) %}{{ 'x' | center(1000000) }}{% endfor %}",
    "literal": "{% for a in range(90000) %}{{ '" + "x" * 150_000 + "' }}{% endfor %}",
    "long turns": "{% for a in range(90000) %}" + "{% set b = 1 %}" * 12_000 + "{% endfor %}",
    "long macro": "{% macro f() %}"
    + "{% set b = 1 %}" * 12_000
    + "{% endmacro %}{% for a in range(90000) %}{{ f() }}{% endfor %}",
    "long text": "{% for a in range(90000) %}" + "x" * 190_000 + "{% endfor %}",
    "arguments": "{% macro f() %}{{ varargs | length }}{% endmacro %}" + MANY + "{% set y = f(*many) %}{% endfor %}",
    # texts that are gone over again and again
    "words": BIG + "{{ big | wordwrap(1) | length }}",
    "stripped": BIG + "{{ big.strip('y' * 999999 ~ 'x') }}",
    "sought from the right": "{{ ('a' * 1000000).rfind('ab' ~ 'a' * 400000) }}",
    "values": "{% set d = {}.fromkeys(range(90000)) %}{% for a in range(90000) %}{% set y = 1 in d.values() %}{% endfor %}",
    "counted": MANY + "{% set y = many.count(1) %}{% endfor %}",
}


def render(template, **values):
    environment = CountedEnvironment()
    environment.begin()
    return environment.from_string(template).render(**values)


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_would_not_end_is_refused_soon(kind):
    start = time.process_time()
    with pytest.raises(TooManySteps):
        render(HOSTILE[kind])
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x'.encode().center(9999999999) }}",
        "{{ (1).to_bytes(9999999999, 'big') }}",
        "{{ 'xy' | urlize }}",
        "{{ 'x' | pprint }}",
        "{{ [1, 2] | random }}",  # another text each time
        "{{ {'a': 1}.keys() - {}.keys() }}",  # in another order each time
        "{{ [-1000000000] | map('_steps') | list }}",
        "{{ 'nan' | float | _steps }}",
        "x" * 200_001,
    ],
)
def test_what_no_length_tells_before_or_chance_makes_is_refused(template):
    with pytest.raises(jinja2.TemplateError):
        render(template)


def test_a_namespace_has_no_text_of_what_it_holds():
    assert render("{% set n = namespace(a=1) %}{% set n.a = namespace(b=n, c=n) %}{{ n }}") == "<Namespace>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ ['a', 'b'] | map('upper') | join('-') }}", "A-B"),
        ("{{ 'A' in (['a'] | map('upper')) }}, {{ 'b' not in {'a': 1} }}, {{ 1 < 2 in [2] }}", "True, True, True"),
        ("{{ [{'a': 'x'}, {}] | selectattr('a', 'in', ['x', 'y']) | list | length }}", "1"),
        ("{{ [{'a': 1}, {}] | map(attribute='a', default=[]) | list }}", "[1, []]"),
        ("{{ '%-3s|%.2f' | format('a', 1.5) }}, {{ '{:>3}'.format('a') }}, {{ '%s' % 3 }}", "a  |1.50,   a, 3"),
        ("{{ dict([('a', 1)]) }}, {{ [1, 2, 3] | batch(2) | list }}", "{'a': 1}, [[1, 2], [3]]"),
        ("{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}", "123"),
        (
            "{% macro m() %}{{ caller() }}!{% endmacro %}{% call m() %}in{% endcall %}"
            "{% block b %}B{% endblock %}{{ self.b() }}",
            "in!BB",
        ),
        ("{% for a in [3, 1, 2] | sort if a > 1 %}{{ loop.index }}{{ a }}{% endfor %}", "1223"),
        ("{{ 'one two' | wordwrap(3) }}, {{ 'a-b'.split('-')[-1].rstrip('b') ~ 1 }}", "one\ntwo, 1"),
        ("{{ {'a': [1]} | tojson(indent=1) }}", '{\n "a": [\n  1\n ]\n}'),
        ("{{ 1700000000 is gt(1000000000) }}, {{ 'x' | default(2000000000) }}", "True, x"),
    ],
)
def test_what_templates_do_is_what_jinja_does(template, expected):
    assert render(template) == expected == jinja2.Environment().from_string(template).render()


def test_long_chats_may_be_measured_in_every_turn():
    last = "loop.index == chat | length and chat[-1].role is string"
    template = "{% for one in chat %}{% if " + last + " %}{{ one.text }}{% endif %}{% endfor %}"
    assert render(template, chat=[{"role": "user", "text": "x" * 1000}] * 3000) == "x" * 1000
