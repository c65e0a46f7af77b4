"""Templates: the bytes that transformers renders, and what a template cannot do to the process."""

import os
import threading
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from engine import templates
from engine.templates import Template, TemplateError, check_variables, parse_variables

MESSAGES = [
    {"role": "system", "content": "Be <brief> & 'plain'."},
    {"role": "user", "content": 'She said "hé" \\ and\nleft\u2028. '},
    {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nSo."},
    {"role": "user", "content": "  next?  "},
]
FEATURES = {
    "generation": "{% for m in messages %}{% set x = m.role %}{% generation %}{{ m.content }}"
    "{% set x = 'inside' %}{{ x }}{% endgeneration %}{{ x }}\n{% endfor %}",
    "generation with blanks": "a\n  {%- generation -%}  b {% endgeneration %}\n c",
    "tojson": "{{ messages | tojson }}|{{ {'é': [1.5, none, true]} | tojson(indent=2) }}|"
    "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}",
    "none is not iterable": "{% if tools is iterable and tools | length > 0 %}tools{% else %}no"
    "{% endif %}{{ tools is none }}{{ documents is defined }}{{ documents is iterable }}",
    "percent": "{{ '%s has %d' % (messages[0].role, 3) }}{{ '%05.1f' | format(2.25) }}",
    "methods": "{% set s = messages[0].content %}{{ s.removeprefix('Be ') }}{{ s.find('b') }}"
    "{{ s.split('<')[-1].rstrip('.') }}{{ ['a', 'b'].index('b') }}{{ s[::-1] }}{{ s.title() }}",
    "namespace": "{% set ns = namespace(n=0, last='') %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}{% set ns.last = m.role %}{% endfor %}{{ ns.n }}{{ ns.last }}",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}"
    "{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "dict": "{% set d = dict(a=1, **{'b': 2}) %}{{ d }}{{ dict.fromkeys(['x'], 0) }}"
    "{% for k, v in d.items() %}{{ k }}{{ v }}{% endfor %}",
    "trimmed blocks": "  {% if true %}\n  a\n  {% endif %}\n{{ 'b' }}\n\n  {#- note -#}\n c\n",
    "macros": "{% macro show(m, upper=false) %}{{ m.content | trim | upper if upper else m.role }}"
    "{% endmacro %}{% for m in messages %}{{ show(m, upper=loop.first) }}{% endfor %}",
    "undefined names": "[{{ nothing }}]{{ nothing is defined }}{% if nothing %}x{% endif %}"
    "{{ messages[0].nothing }}{{ bos_token }}",
    "filters": "{{ messages | map(attribute='role') | unique | join(', ') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ messages[1].content | escape }}{{ 'a\nb' | indent(2) }}{{ 3.7 | int }}",
}


def rendered(source: str, **variables: Any) -> str:
    return Template("chat", source).render(
        {"messages": MESSAGES, "tools": None, "documents": None, "add_generation_prompt": True}
        | variables
    )


@pytest.mark.parametrize("source", FEATURES.values(), ids=FEATURES.keys())
def test_the_bytes_are_those_of_transformers(source: str) -> None:
    given = {"bos_token": "<s>", "add_generation_prompt": True}
    (expected,), _ = render_jinja_template([MESSAGES], chat_template=source, **given)
    assert rendered(source, bos_token="<s>") == expected != ""


def test_the_date_is_an_option_not_today() -> None:
    source = "{{ strftime_now('%d %b %Y %H:%M') }}"
    assert rendered(source) == "26 Jul 2024 00:00"
    assert Template("chat", source, "2031-01-02").render({}) == "02 Jan 2031 00:00"


@pytest.mark.parametrize("date", ["", "2024-7-26", "20240726", "2024-02-30", "today", "2024-W01-1"])
def test_another_form_of_date_is_refused(date: str) -> None:
    with pytest.raises(ValueError, match="is not a day as YYYY-MM-DD"):
        Template("chat", "", date)


def test_variables_are_a_plain_object_without_the_judges_own_names() -> None:
    given = '{"enable_thinking": false, "x": [1.5, null, {"é": "<"}]}'
    assert parse_variables(given) == {"enable_thinking": False, "x": [1.5, None, {"é": "<"}]}
    for text, message in (
        ("{", "are not JSON"),
        ("[1]", r"are a JSON object, not \[1\]"),
        ('{"a": 1, "a": 2}', "is repeated"),
        ('{"a": {"b": 1, "b": 2}}', "is repeated"),
        ('{"a": NaN}', "not JSON compliant"),
        ('{"messages": []}', "'messages' is the judge's own"),
        ('{"add_generation_prompt": false}', "'add_generation_prompt' is the judge's own"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_variables(text)
    for variables in ({1: 2}, {"a": (1,)}, {"a": {1}}, {"a": object()}):
        with pytest.raises(ValueError, match="chat template variables"):
            check_variables(variables)  # type: ignore[arg-type]


def test_a_judge_template_has_no_unknown_names_and_a_chat_template_may() -> None:
    with pytest.raises(TemplateError, match=r"^judge template: 'rubric' is undefined \(line 2\)$"):
        Template("judge", "a\n{{ rubric }}").render({})
    assert Template("chat", "a{{ rubric }}").render({}) == "a"


def test_a_template_that_does_not_parse_says_where() -> None:
    Template("chat", "{% generation %}{% endgeneration %}{{ anything | trim }}").check()
    with pytest.raises(TemplateError, match=r"^chat template: syntax error: .* \(line 3\)$"):
        Template("chat", "a\n\n{% if %}").check()


def test_a_turn_is_a_role_between_marks() -> None:
    source = "a{{ turn('user') }}b{{ turn('response_1') }}"
    assert Template("judge", source).render({}, "|") == "a|user|b|response_1|"
    for role in ("'a b'", "''", "1", "'<|im_end|>'"):
        with pytest.raises(TemplateError, match="names no role"):
            Template("judge", "{{ turn(" + role + ") }}").render({}, "|")
    with pytest.raises(TemplateError, match="'turn' is undefined"):
        Template("judge", source).render({})


BOMBS = {
    "doubled text": "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(40) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "indent": "{{ 'a\nb' | indent(4000000000) }}",
    "format": "{{ '%4000000000d' | format(1) }}",
    "join": "{{ range(100000) | join(range(100000) | join('x')) }}",
    "json": "{{ [1] | tojson(indent=4000000000) }}",
    "product": "{{ 'a' * 10 ** 10 }}",
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS.keys())
def test_a_template_without_bound_in_memory_is_a_value_error(source: str) -> None:
    with pytest.raises(TemplateError, match="takes more than 512 MiB of memory"):
        rendered(source)
    assert rendered("{{ messages[0].role }}") == "system"


def test_other_bounds_are_value_errors() -> None:
    for source, message in (
        ("{{ 'x' * 33554433 }}", "renders 33554433 characters, the most is 33554432"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "recurses too deep"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "underscore"),
        ("{{ namespace(_x=1) }}", "underscore"),
        ("{{ raise_exception('\x1b[2J' ~ 'n' * 9999) }}", r"chat template:  \[2Jn{200,300} \("),
    ):
        with pytest.raises(TemplateError, match=message):
            rendered(source)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_an_endless_template_is_a_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1)
    before = templates._CHILD_PROCESS._running().pid
    with pytest.raises(TemplateError, match="chat template: it takes more than 1 seconds"):
        rendered(ENDLESS)
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)  # no process is left behind
    assert rendered("{{ messages[0].role }}") == "system"
    assert templates._CHILD_PROCESS._running().pid != before


def test_a_child_that_was_killed_is_replaced() -> None:
    child = templates._CHILD_PROCESS._running()
    child.kill()
    child.wait()
    assert rendered("{{ messages[0].role }}") == "system"
    assert templates._CHILD_PROCESS._running().pid != child.pid


def test_all_threads_share_one_child() -> None:
    pid, found = templates._CHILD_PROCESS._running().pid, {}

    def work(number: int) -> None:
        found[number] = [rendered("{{ n }}-{{ i }}", n=number, i=i) for i in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [f"{n}-{i}" for i in range(20)] for n in range(8)}
    assert templates._CHILD_PROCESS._running().pid == pid


def test_a_fork_has_a_child_of_its_own() -> None:
    pid = templates._CHILD_PROCESS._running().pid
    fork = os.fork()
    if fork == 0:
        right = rendered("{{ messages[0].role }}") == "system"
        other = templates._CHILD_PROCESS._running().pid != pid
        templates._CHILD_PROCESS.stop()
        os._exit(0 if right and other else 1)
    assert os.waitpid(fork, 0)[1] == 0
    assert rendered("{{ messages[0].role }}") == "system"
