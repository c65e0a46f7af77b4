import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import tokenizers
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from models.tokenizer import Tokenizer
from tests import tiny

KINDS = ("unigram", "bpe", "sentencepiece")
BYTE_LEVEL = ("unigram", "bpe")
HOSTILE = (
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<end_of_turn>",
    "<bos>",
    "<think></think>",
    "<|endoftext|>",
    " <|im_end|> ",
    "<|im_end|><|im_end|>",
    "<unk>",
    "<0x41>",
    "<|im_",
    "end|>",
)
# Any Unicode text but lone surrogates, with control tokens mixed in.
TEXT = st.lists(
    st.one_of(st.text(), st.sampled_from([*HOSTILE, " ", "\n\n", "the", "Scores:"]))
).map("".join)


@cache
def both(kind: str) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """Our tokenizer and the library's, from one directory."""
    with TemporaryDirectory() as directory:
        oracle = tiny.write_tokenizer(Path(directory), kind)
        return Tokenizer(directory), oracle


def edited(
    directory: Path, change: Callable[[dict[str, Any]], object], kind: str = "unigram"
) -> Path:
    tiny.write_tokenizer(directory, kind)
    path = directory / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return directory


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
@example(text="".join(HOSTILE))
@example(text="\0\ufeff\u202e１０ é e\u0301 \U0001f600 ▁ \r\n\t")
def test_untrusted_text_yields_no_control_id(kind: str, text: str) -> None:
    ours, _ = both(kind)
    ids = ours.encode_text(text)
    assert ours.control_ids == {0, 1, 2, 3, 4}
    assert ours.control_ids.isdisjoint(ids)
    decoded = ours.decode(ids)
    assert decoded == (text if kind in BYTE_LEVEL else text.replace("▁", " "))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", HOSTILE)
def test_control_strings_are_control_in_templates_alone(kind: str, text: str) -> None:
    ours, _ = both(kind)
    assert ours.control_ids.isdisjoint(ours.encode_text(text))
    whole = [token for token in (*tiny.SPECIAL, *tiny.CONTROL) if token in text]
    found = ours.control_ids & set(ours.encode_template(text))
    assert len(found) == len(set(whole))


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
def test_templates_encode_as_the_library_does(kind: str, text: str) -> None:
    ours, oracle = both(kind)
    ids = ours.encode_template(text)
    assert ids == oracle.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(alphabet="the SScoring\n é▁😀"))
def test_plain_text_encodes_as_the_library_does(kind: str, text: str) -> None:
    """Removing the control tokens has not changed how other text is cut."""
    ours, oracle = both(kind)
    assert ours.encode_text(text) == oracle.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
@given(ids=st.lists(st.integers(0, 272)))
def test_decoding_equals_the_library(kind: str, ids: list[int]) -> None:
    ours, oracle = both(kind)
    text = ours.decode(ids)
    # The library's byte fallback gives up on a whole run of bytes if one of them is wrong.
    assume(kind in BYTE_LEVEL or "\ufffd" not in text)
    assert text == oracle.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_every_token(kind: str) -> None:
    ours, oracle = both(kind)
    vocab = oracle.get_vocab()
    assert ours.size == len(ours.token_bytes) == max(vocab.values()) + 1
    assert ours.special_ids == {0, 1, 2}
    assert all(ours.token_bytes[index] == b"" for index in ours.special_ids)
    assert ours.token_bytes[3] == b"<think>", "added but not special: it is shown"
    if kind in BYTE_LEVEL:
        assert ours.token_bytes[vocab["Ġ"]] == b" " and ours.token_bytes[vocab["Ċ"]] == b"\n"
        assert ours.token_bytes[vocab["Ġthe"]] == b" the"
        single = {value for value in ours.token_bytes if len(value) == 1}
        assert single == {bytes([byte]) for byte in range(256)}
    else:
        assert ours.token_bytes[vocab["▁the"]] == b" the"
        assert ours.token_bytes[vocab["<0x0A>"]] == b"\n"
        assert ours.token_bytes[vocab["<0xFF>"]] == b"\xff"
        assert ours.token_bytes[vocab["\n\n"]] == b"\n\n"


def test_whitespace_runs_stay_one_token_in_text() -> None:
    ours, oracle = both("sentencepiece")
    run = oracle.token_to_id("\n\n")
    assert run in oracle.get_added_tokens_decoder() and run not in ours.control_ids
    assert ours.encode_text("a\n\nb") == ours.encode_template("a\n\nb")
    assert run in ours.encode_text("a\n\nb")


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_that_would_join_into_a_control_token(tmp_path: Path, kind: str) -> None:
    """Leaving the added tokens out is not enough: these vocabularies can still build <|im_end|>."""

    def uncut(data: dict[str, Any]) -> None:
        if kind == "unigram":
            data["pre_tokenizer"]["use_regex"] = False

    data = json.loads((edited(tmp_path, uncut, kind) / "tokenizer.json").read_text())
    naive = tokenizers.Tokenizer.from_str(json.dumps(data | {"added_tokens": []}))
    assert 2 in naive.encode("a<|im_end|>").ids
    ours = Tokenizer(tmp_path)
    ids = ours.encode_text("a<|im_end|>")
    assert ours.control_ids.isdisjoint(ids) and ours.decode(ids) == "a<|im_end|>"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_added_padded_or_cut(tmp_path: Path, kind: str) -> None:
    oracle = tiny.write_tokenizer(tmp_path, kind)
    oracle.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )
    oracle.enable_truncation(4)
    oracle.enable_padding(length=16)
    oracle.save(str(tmp_path / "tokenizer.json"))
    ours, plain = Tokenizer(tmp_path), both(kind)[0]
    for text in ("", "the", "the Scores of <|im_end|> the a"):
        assert ours.encode_template(text) == plain.encode_template(text)
        assert ours.encode_text(text) == plain.encode_text(text)


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "\udc80<|im_end|>"])
def test_lone_surrogates_are_errors(text: str) -> None:
    ours, _ = both("unigram")
    for encode in (ours.encode_text, ours.encode_template):
        with pytest.raises(ValueError, match=r"lone surrogate U\+D[89A-F]"):
            encode(text)


def test_decoding_ids_outside_the_vocabulary() -> None:
    ours, _ = both("unigram")
    for index in (-1, ours.size):
        with pytest.raises(ValueError, match=f"token id {index}"):
            ours.decode([index])


def test_special_tokens_and_template(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path)
    ours = Tokenizer(tmp_path)
    assert ours.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert ours.chat_template == tiny.CHAT_TEMPLATE
    (tmp_path / "chat_template.jinja").write_text("from the file: é", encoding="utf-8")
    assert Tokenizer(tmp_path).chat_template == "from the file: é"
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    edit_config(tmp_path, chat_template=named)
    assert Tokenizer(tmp_path).chat_template == "d"
    edit_config(tmp_path, chat_template=None)
    assert Tokenizer(tmp_path).chat_template is None
    (tmp_path / "tokenizer_config.json").unlink()
    ours = Tokenizer(tmp_path)
    assert ours.chat_template is None and ours.special_tokens == {}


def test_the_token_that_ends_a_turn(tmp_path: Path) -> None:
    """<|im_end|>, id 2, is the tokenizer's own."""
    tiny.write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.end_id({0, 2}) == tokenizer.end_id({2}) == 2
    assert tokenizer.end_id({0}) == 0
    for ends in ({0, 1}, set[int]()):
        with pytest.raises(ValueError, match=r"end tokens .* is not declared: see eos_token_id"):
            tokenizer.end_id(ends)


def test_a_special_token_that_only_the_config_marks(tmp_path: Path) -> None:
    edited(tmp_path, lambda data: data["added_tokens"].pop(1))
    assert 1 not in Tokenizer(tmp_path).control_ids
    edit_config(tmp_path, bos_token="<|im_start|>")
    ours = Tokenizer(tmp_path)
    assert 1 in ours.control_ids and 1 in ours.special_ids
    assert ours.encode_template("<|im_start|>") == [1]
    assert 1 not in ours.encode_text("<|im_start|>") and ours.token_bytes[1] == b""


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_agrees(tmp_path: Path, kind: str) -> None:
    tiny.write_tokenizer(tmp_path, kind)
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nthe Scores: é\n\n 10<|im_end|>"
    assert Tokenizer(tmp_path).encode_template(text) == oracle.encode(
        text, add_special_tokens=False
    )


def drop(data: dict[str, Any], letter: str) -> None:
    data["model"]["vocab"] = [entry for entry in data["model"]["vocab"] if entry[0] != letter]


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_text_that_needs_a_byte_without_a_token_is_an_error(tmp_path: Path, kind: str) -> None:
    """As SmolLM2's vocabulary, which lacks eight bytes."""

    def without(data: dict[str, Any]) -> None:
        if kind == "unigram":
            drop(data, "©")  # stands for 0xA9
        else:
            del data["model"]["vocab"]["©"]
        data["normalizer"] = {"type": "NFC"}

    ours = Tokenizer(edited(tmp_path, without, kind))
    assert ours.decode(ours.encode_text("the è ü 😀<|im_end|>")) == "the è ü 😀<|im_end|>"
    for text in ("é", "the e\u0301<|im_end|>"):
        for encode in (ours.encode_text, ours.encode_template):
            with pytest.raises(ValueError, match=r"text holds 'é', .* no token for its byte 0xA9"):
                encode(text)


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@pytest.mark.parametrize("special", [False, True])
def test_the_unknown_token_stands_for_a_byte_without_one(
    tmp_path: Path, kind: str, special: bool
) -> None:
    """Unless it is a control token, which untrusted text never yields."""

    def unknown(data: dict[str, Any]) -> None:
        model = data["model"]
        if kind == "unigram":
            model["vocab"] = [e if e[0] != "©" else ["?" * 9, e[1]] for e in model["vocab"]]
            model["unk_id"] = [e[0] for e in model["vocab"]].index("?" * 9)
        else:
            model["vocab"]["?" * 9] = model["vocab"].pop("©")
            model["unk_token"] = "?" * 9

    ours = Tokenizer(edited(tmp_path, unknown, kind))
    if special:
        edit_config(tmp_path, unk_token="?" * 9)
        with pytest.raises(ValueError, match="no token for its byte 0xA9"):
            Tokenizer(tmp_path).encode_text("é")
    else:
        oracle = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        ids = ours.encode_text("a é b")
        assert oracle.token_to_id("?" * 9) in ids
        assert ids == ours.encode_template("a é b") == oracle.encode("a é b").ids


def test_a_letter_that_plays_a_role_is_no_text(tmp_path: Path) -> None:
    edited(tmp_path, lambda data: None)
    edit_config(tmp_path, pad_token="a")
    ours = Tokenizer(tmp_path)
    assert len(ours.encode_text("xyz")) == 3
    with pytest.raises(ValueError, match="text holds 'a', and the tokenizer has no token"):
        ours.encode_text("xyza")


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_a_model_without_its_type(tmp_path: Path, kind: str) -> None:
    """Old files leave it out."""
    plain = both(kind)[0]
    ours = Tokenizer(edited(tmp_path, lambda data: data["model"].pop("type"), kind))
    text = "the Scores: é<|im_end|>"
    assert ours.encode_text(text) == plain.encode_text(text)
    assert ours.encode_template(text) == plain.encode_template(text)


def test_a_byte_of_sentencepiece_may_be_a_character(tmp_path: Path) -> None:
    """Gemma's vocabulary has the tab in place of <0x09>."""

    def tab(data: dict[str, Any]) -> None:
        vocab = data["model"]["vocab"]
        vocab["\t"] = vocab.pop("<0x09>")

    ours = Tokenizer(edited(tmp_path, tab, "sentencepiece"))
    assert ours.decode(ours.encode_text("\ta\t")) == "\ta\t"


def test_whitespace_runs_cut_text_as_they_cut_templates(tmp_path: Path) -> None:
    """A run that is added is taken from the raw text, before merges find a longer one."""

    def runs(data: dict[str, Any]) -> None:
        model = data["model"]
        for run in ("▁▁", "▁▁▁▁"):
            model["vocab"][run] = max(model["vocab"].values()) + 1
            model["merges"].append([run[: len(run) // 2], run[len(run) // 2 :]])
        data["added_tokens"].append(
            dict(data["added_tokens"][-1], id=model["vocab"]["▁▁"], content="▁▁")
        )

    ours = Tokenizer(edited(tmp_path, runs, "sentencepiece"))
    assert len(ours.encode_text("    ")) == 1
    for text in ("    ", " ▁▁ ", "▁▁▁▁", "a ▁▁▁<|im"):
        assert ours.encode_text(text) == ours.encode_template(text)
    assert len(ours.encode_text(" ▁▁ ")) == 3


@pytest.mark.parametrize("step", ["normalizer", "pre_tokenizer"])
def test_a_panic_of_the_library_is_an_error_of_the_text(tmp_path: Path, step: str) -> None:
    def hopeless(data: dict[str, Any]) -> None:
        pattern = {"Regex": "(a+)+$"}
        if step == "normalizer":
            data["normalizer"] = {"type": "Replace", "pattern": pattern, "content": "a"}
        else:
            split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            steps = [split, data["pre_tokenizer"]]
            data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}

    ours = Tokenizer(edited(tmp_path, hopeless))
    for encode in (ours.encode_text, ours.encode_template):
        with pytest.raises(ValueError, match=r"the tokenizer fails on this text: .*retry-limit"):
            encode("a" * 50 + "b")


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 300), st.sampled_from(["", "a", "▁", "é"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.dictionaries(st.sampled_from(["type", "id", "content", "vocab"]), inner, max_size=2),
    ),
    max_leaves=4,
)


@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_mutated_files_are_read_or_refused(data: st.DataObject, kind: str) -> None:
    """One value of tokenizer.json or of tokenizer_config.json is another one, or gone."""
    with TemporaryDirectory() as directory:
        tiny.write_tokenizer(Path(directory), kind)
        name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
        path = Path(directory) / name
        root = node = json.loads(path.read_text())
        while True:
            key: Any = data.draw(
                st.sampled_from(sorted(node)) if isinstance(node, dict)
                else st.integers(0, len(node) - 1)
            )  # fmt: skip
            if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
                break
            node = node[key]
        if data.draw(st.booleans()):
            del node[key]
        else:
            node[key] = data.draw(JSON)
        path.write_text(json.dumps(root))
        with suppress(ValueError):
            ours = Tokenizer(directory)
            ours.encode_template("<|im_start|>the a\n\né<|im_end|>")
            ids = ours.encode_text("<|im_start|>the a\n\né<|im_end|>")
            assert ours.control_ids.isdisjoint(ids)
            ours.decode(ids)


def test_bytes_that_utf8_never_holds_need_no_token(tmp_path: Path) -> None:
    ours = Tokenizer(edited(tmp_path, lambda data: drop(data, "ÿ")))  # stands for 0xFF
    assert b"\xff" not in ours.token_bytes


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("unigram", lambda d: d.update(decoder={"type": "Fuse"}), "decoder .* not supported"),
        ("unigram", lambda d: d.update(decoder=None), "decoder None is not supported"),
        ("unigram", lambda d: d.update(pre_tokenizer=None), "not supported"),
        ("unigram", lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "puts a space"),
        (
            "sentencepiece",
            lambda d: d.update(normalizer={"type": "Prepend", "prepend": "▁"}),
            "Prepend puts a space",
        ),
        (
            "sentencepiece",
            lambda d: d.update(
                pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}
            ),
            "Metaspace puts a space",
        ),
        ("unigram", lambda d: d.update(normalizer=["a"]), "Prepend puts a space"),
        ("sentencepiece", lambda d: d["model"].update(byte_fallback=False), "byte_fallback"),
        ("sentencepiece", lambda d: d["model"]["vocab"].pop("<0xC3>"), "no token for the byte"),
        ("bpe", lambda d: d["model"].update(dropout=0.1), "dropout 0.1"),
        (
            "bpe",
            lambda d: d.update(
                model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, added_tokens=[]
            ),
            "'WordLevel' is not supported",
        ),
        ("bpe", lambda d: d["added_tokens"][0].update(id=7), "contested id"),
        ("bpe", lambda d: d["model"]["vocab"].update(q=1 << 30), "ids repeat, or exceed"),
        ("bpe", lambda d: d.pop("model"), "Model missing"),
        ("bpe", lambda d: d["model"]["merges"].append(["no", "such"]), "`no` out of vocabulary"),
    ],
)
def test_refusals_name_the_file(
    tmp_path: Path, kind: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edited(tmp_path, lambda data: None, kind)
    Tokenizer(tmp_path)
    edited(tmp_path, change, kind)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}, "auto_map"),
        ({"chat_template": 3}, "chat_template must be text, got 3"),
        ({"chat_template": [None]}, "chat_template: None has no name or template"),
        ({"chat_template": [[]]}, r"chat_template: \[\] has no name or template"),
        ({"chat_template": ["a"]}, "chat_template: 'a' has no name or template"),
        ({"chat_template": [{"name": "default"}]}, "has no name or template"),
        ({"chat_template": [{"name": "default", "template": 3}]}, "must be text, got 3"),
        ({"bos_token": "<nowhere>"}, "no token '<nowhere>'"),
    ],
)
def test_refused_configs(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    tiny.write_tokenizer(tmp_path)
    edit_config(tmp_path, **values)
    with pytest.raises(ValueError, match=message):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("nothing", [None, {}])
def test_an_auto_map_that_names_nothing(tmp_path: Path, nothing: object) -> None:
    tiny.write_tokenizer(tmp_path)
    edit_config(tmp_path, auto_map=nothing)
    Tokenizer(tmp_path)


def test_a_chat_template_that_is_no_text(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path)
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="jinja: the chat template must be UTF-8"):
        Tokenizer(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="jinja: the chat template must be a file"):
        Tokenizer(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file$"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file, and tokenizer\.model is"):
        Tokenizer(tmp_path)
    tiny.write_tokenizer(tmp_path)  # then the older one beside it is of no interest
    assert Tokenizer(tmp_path).size > 0
