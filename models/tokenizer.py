"""Text to token ids and back, for template text and for untrusted text.

Two encoders come from one `tokenizer.json`. The template encoder recognises added tokens, the text
encoder is rebuilt without any. Where an added token also stands in the model's vocabulary, the text
encoder renames the entry to a random string, which keeps all ids in place, and drops the merges
that lead to it. So `<|im_end|>` in untrusted text becomes ordinary pieces. The one exception are
the whitespace runs that Gemma lists as added: they control nothing, and text is cut at them too.
Neither encoder adds, pads or truncates anything.

Byte-level BPE and Unigram models, and SentencePiece-style ones with byte fallback, are understood.
These encode every text, or nearly so: some byte-level vocabularies lack the bytes of rare
characters, and text that needs one is an error, unless they have an unknown token that is no
control token. A normalizer, where tokenizer.json has one, still applies (Qwen's is NFC); without
one, byte-level text comes back from its ids unchanged. Other models are refused, as are tokenizers
that put a space of their own before the text.

It does not render chat templates.
"""

import json
import os
import secrets
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from models.files import read_json, read_text

_ROLES = (
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
_MAX_ID = 1 << 24  # bounds the tables below, whatever a file says
_SPACE = "\u2581"  # SentencePiece's visible space
# All bytes but the 13 that no UTF-8 text holds: a vocabulary may do without these.
UTF8_BYTES = frozenset(range(0xF5)) - {0xC0, 0xC1}


def _byte_of_letter() -> dict[str, int]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


# GPT-2's alphabet: printable Latin-1 letters stand for themselves, the rest for U+0100 on.
BYTE_OF_LETTER = _byte_of_letter()


class Tokenizer:
    """The tokenizer of a model directory.

    control_ids: ids of all added tokens but whitespace runs; untrusted text cannot yield them.
    special_ids: those of them that are marked special or play a role in `special_tokens`; they
    decode to nothing.
    token_bytes: the raw bytes of each id, b"" for special ids and for ids without a token.
    size: the largest id + 1. special_tokens: strings by role ("bos_token", "eos_token", ...), as
    chat templates name them. chat_template: Jinja source or None.
    """

    control_ids: frozenset[int]
    special_ids: frozenset[int]
    token_bytes: list[bytes]
    size: int
    special_tokens: dict[str, str]
    chat_template: str | None

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja of a directory.

        Raises ValueError naming the file for whatever is malformed or unsupported.
        """
        path = Path(directory) / "tokenizer.json"
        config_path = path.with_name("tokenizer_config.json")
        config = read_json(config_path) if config_path.exists() else {}
        if config.get("auto_map"):
            raise ValueError(f"{config_path}: auto_map names code to run, which is refused")
        self.special_tokens = _special_tokens(config)
        self.chat_template = _chat_template(config_path, config)

        _require_file(path)
        bare: dict[str, Any] = {"post_processor": None, "truncation": None, "padding": None}
        data = read_json(path) | bare
        template = _build(path, data)
        model = _model(path, data, template)
        byte_level = _is_byte_level(path, template)
        vocab = template.get_vocab(with_added_tokens=False)
        self.control_ids, self.special_ids = _added_ids(
            path, data, template, vocab, self.special_tokens
        )
        text_vocab = {token: i for token, i in vocab.items() if i not in self.control_ids}
        self._absent = _absent_bytes(path, model, text_vocab, byte_level)
        contents = {index: content for content, index in template.get_vocab().items()}
        self.size = max(contents) + 1
        if self.size > _MAX_ID or len(contents) != len(template.get_vocab()):
            raise ValueError(f"{path}: ids repeat, or exceed {_MAX_ID}")
        self.token_bytes = [b""] * self.size
        for index, content in contents.items():
            if index not in self.special_ids:
                control = index in self.control_ids
                self.token_bytes[index] = _content_bytes(content, byte_level, control)
        self._template = template
        self._added = _only_added(template)
        control_names = {template.id_to_token(index): index for index in self.control_ids}
        self._control_of = {  # its ids -> control ids
            own: control_names[token.content]
            for own, token in self._added.get_added_tokens_decoder().items()
            if token.content in control_names
        }
        whitespace = [
            token
            for token in data.get("added_tokens") or []
            if text_vocab.get(token["content"]) == token["id"]
        ]
        model = _without_control(model, self.control_ids)
        self._text = _build(path, data | {"added_tokens": whitespace, "model": model})

    def encode_template(self, text: str) -> list[int]:
        """Ids of trusted text: added tokens are recognised; no BOS or EOS is added.

        Raises ValueError as `encode_text` does.
        """
        return self._encode(self._template, text)

    def encode_text(self, text: str) -> list[int]:
        """Ids of untrusted text: no control id can appear, whatever the text.

        Raises ValueError for lone surrogates, which have no UTF-8 form, for a character with a byte
        that the vocabulary lacks, and for text on which the tokenizers library gives up.
        """
        ids = self._encode(self._text, text)
        if not self.control_ids.isdisjoint(ids):
            raise ValueError(f"text yields control ids {sorted(self.control_ids & set(ids))}")
        return ids

    def control_spans(self, text: str) -> list[tuple[int, int, int]]:
        """Of each control token that `encode_template` finds in the text: its id, and where in the
        text it begins and ends, with the blanks that it takes."""
        _require_unicode(text)
        with _library("the tokenizer fails on this text"):
            found = self._added.encode(text, add_special_tokens=False)
        spans = zip(found.ids, found.offsets, strict=True)
        known = self._control_of
        return [(known[own], begin, end) for own, (begin, end) in spans if own in known]

    def _encode(self, tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
        _require_unicode(text)
        with _library("the tokenizer fails on this text"):
            if self._absent:
                normalizer = tokenizer.normalizer
                self._require_tokens(text if normalizer is None else normalizer.normalize_str(text))
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _require_tokens(self, text: str) -> None:
        if self._absent.isdisjoint(text.encode("utf-8")):
            return
        letter = next(x for x in text if not self._absent.isdisjoint(x.encode("utf-8")))
        byte = next(x for x in letter.encode("utf-8") if x in self._absent)
        raise ValueError(
            f"text holds {letter!r}, and the tokenizer has no token for its byte 0x{byte:02X}"
        )

    def token(self, index: int) -> str | None:
        """An id's token as tokenizer.json writes it, None for an id without a token."""
        token: str | None = self._template.id_to_token(index)
        return token

    def end_id(self, eos_token_ids: Collection[int]) -> int:
        """The token that ends a turn of a model with these end tokens: the tokenizer's own where it
        is one of them, else the only one. Raises ValueError where there are several, or none."""
        own = self.encode_template(self.special_tokens.get("eos_token", ""))
        if len(own) == 1 and own[0] in eos_token_ids:
            return own[0]
        if len(eos_token_ids) != 1:
            raise ValueError(
                f"which of the end tokens {sorted(eos_token_ids)} ends a judgement is not "
                "declared: see eos_token_id in config.json, eos_token in tokenizer_config.json"
            )
        return next(iter(eos_token_ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special ones skipped; bytes that are not UTF-8 become U+FFFD."""
        ids = list(ids)
        if ids and (min(ids) < 0 or max(ids) >= self.size):
            index = next(i for i in ids if not 0 <= i < self.size)
            raise ValueError(
                f"token id {index} is outside the tokenizer, whose size is {self.size}"
            )
        return b"".join([self.token_bytes[i] for i in ids]).decode("utf-8", errors="replace")

    def show(self, ids: Iterable[int]) -> str:
        """Text of ids with special tokens written out; bytes that are not UTF-8 become U+FFFD."""
        added = self._template.get_added_tokens_decoder()
        special = {i: added[i].content.encode() for i in self.special_ids}
        written = [special.get(i, self.token_bytes[i]) for i in ids]
        return b"".join(written).decode("utf-8", errors="replace")


@contextmanager
def _library(where: object) -> Iterator[None]:
    """Turn what the tokenizers library raises into ValueError: bare Exceptions, and panics of its
    Rust code, whose class cannot be imported and is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__module__ != "pyo3_runtime":
            raise
        raise ValueError(f"{where}: {error}") from None


def _require_file(path: Path) -> None:
    """Raise where there is only the older form of a tokenizer."""
    for name in ("tokenizer.model", "vocab.json"):
        if not path.exists() and path.with_name(name).exists():
            raise ValueError(
                f"{path}: no such file, and {name} is not read; transformers makes the one of the "
                "other: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )


def _build(path: Path, data: dict[str, Any]) -> tokenizers.Tokenizer:
    with _library(path):
        return tokenizers.Tokenizer.from_str(json.dumps(data))


def _model(path: Path, data: dict[str, Any], built: tokenizers.Tokenizer) -> dict[str, Any]:
    """The model with its type, which old files leave to the library to find."""
    model, kind = data["model"], type(built.model).__name__
    if kind not in ("BPE", "Unigram") or not isinstance(model, dict):
        raise ValueError(f"{path}: model type {kind!r} is not supported")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{path}: model.{key} {model[key]!r} is not supported")
    return model | {"type": kind}


def _require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f"text holds a lone surrogate U+{code:04X} at {error.start}") from None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by role, written as strings or as objects with a `content`."""
    found = {}
    for role in _ROLES:
        value = config.get(role)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[role] = content
    return found


def chat_template_of(directory: str | os.PathLike[str]) -> str | None:
    """The Jinja source of a model directory's chat template, or None; ValueError as `Tokenizer`."""
    config_path = Path(directory) / "tokenizer_config.json"
    return _chat_template(config_path, read_json(config_path) if config_path.exists() else {})


def _chat_template(config_path: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja before tokenizer_config.json, as transformers reads them."""
    jinja = config_path.with_name("chat_template.jinja")
    if os.path.lexists(jinja):
        return read_text(jinja, "the chat template")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        for entry in template:
            if not isinstance(entry, dict) or not {"name", "template"} <= entry.keys():
                raise ValueError(f"{config_path}: chat_template: {entry!r} has no name or template")
        template = next((e["template"] for e in template if e["name"] == "default"), None)
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{config_path}: chat_template must be text, got {template!r}")
    return template


def _only_added(built: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """One that finds the same added tokens, and takes all text between two for one unknown word."""
    unknown = secrets.token_hex(16)
    finder = tokenizers.Tokenizer(tokenizers.models.WordLevel({unknown: 0}, unk_token=unknown))
    if built.normalizer is not None:
        finder.normalizer = built.normalizer
    finder.add_tokens(list(built.get_added_tokens_decoder().values()))
    return finder


def _steps(step: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder of the library, with sequences unrolled.

    From the object, not from the file, where the library understands more spellings than one.
    """

    def unrolled(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if value["type"] != "Sequence":
            yield value
        for key in ("normalizers", "pretokenizers", "decoders"):
            for inner in value.get(key, []):
                yield from unrolled(inner)

    return [] if step is None else list(unrolled(json.loads(step.__getstate__())))


def _is_byte_level(path: Path, built: tokenizers.Tokenizer) -> bool:
    """Whether tokens are spelt in the byte alphabet (else SentencePiece's); others raise."""
    before = [*_steps(built.normalizer), *_steps(built.pre_tokenizer)]
    for step in before:
        if (
            step["type"] == "Prepend"
            or step.get("add_prefix_space")
            or step.get("prepend_scheme", "never") != "never"
        ):
            raise ValueError(f"{path}: {step['type']} puts a space before text: not supported")
    after = _steps(built.decoder)
    spelt = any(step["type"] == "ByteLevel" for step in before)
    if spelt and [step["type"] for step in after] == ["ByteLevel"]:
        return True
    visible = any(
        step["type"] == "Metaspace"
        or (step["type"] == "Replace" and step["pattern"] == {"String": _SPACE})
        for step in after
    )
    if not spelt and visible:
        return False
    raise ValueError(f"{path}: decoder {built.decoder} is not supported")


def _absent_bytes(
    path: Path, model: dict[str, Any], vocab: dict[str, int], byte_level: bool
) -> frozenset[int]:
    """Bytes of UTF-8 for which byte-level text has no token, not even an unknown one.

    `vocab` is without control tokens. Raises where SentencePiece's text could lose a character.
    """
    if byte_level:
        unknown = model.get("unk_token" if model["type"] == "BPE" else "unk_id")
        if unknown in vocab if model["type"] == "BPE" else unknown in vocab.values():
            return frozenset()
        held = {byte for letter, byte in BYTE_OF_LETTER.items() if letter in vocab}
        return UTF8_BYTES - held
    if not model.get("byte_fallback"):
        raise ValueError(f"{path}: without byte_fallback some text cannot be encoded")
    # A byte below 0x80 is a character of its own: Gemma has a token for the tab instead.
    missing = [
        name
        for byte in sorted(UTF8_BYTES)
        if (name := f"<0x{byte:02X}>") not in vocab and not (byte < 0x80 and chr(byte) in vocab)
    ]
    if missing:
        raise ValueError(f"{path}: no token for the byte {missing[0]!r} ({len(missing)} missing)")
    return frozenset()


def _added_ids(
    path: Path,
    data: dict[str, Any],
    template: tokenizers.Tokenizer,
    vocab: dict[str, int],
    special_tokens: dict[str, str],
) -> tuple[frozenset[int], frozenset[int]]:
    """Ids of control tokens, and of the special ones among them.

    A special token that only tokenizer_config.json marks is added to the template encoder.
    """
    known = {token.content for token in template.get_added_tokens_decoder().values()}
    for content in dict.fromkeys(special_tokens.values()):
        if content not in known and content not in vocab:
            raise ValueError(f"{path}: no token {content!r}, which tokenizer_config.json names")
        if content not in known:
            template.add_special_tokens([content])
    for token in data.get("added_tokens") or []:
        if template.token_to_id(token["content"]) != token["id"]:
            raise ValueError(f"{path}: added token {token['content']!r} has a contested id")
    control, special = set(), set()
    for index, token in template.get_added_tokens_decoder().items():
        if token.special or token.content in special_tokens.values():
            special.add(index)
        if index in special or token.content.strip(f"{_SPACE} \t\n\r"):
            control.add(index)
    return frozenset(control), frozenset(special)


def _without_control(model: dict[str, Any], control_ids: frozenset[int]) -> dict[str, Any]:
    """The model with the entries of control ids renamed to strings that no text will hold."""

    def unguessable() -> str:
        return f"\0{secrets.token_hex(16)}"

    if model["type"] == "Unigram":
        pieces = [
            [unguessable() if index in control_ids else piece, score]
            for index, (piece, score) in enumerate(model["vocab"])
        ]
        return model | {"vocab": pieces}
    renamed = {
        content: unguessable() for content, index in model["vocab"].items() if index in control_ids
    }
    merges = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if renamed.keys().isdisjoint((left, right, left + right)):
            merges.append(merge)
    vocab = {renamed.get(content, content): index for content, index in model["vocab"].items()}
    unknown = model.get("unk_token")
    return model | {"vocab": vocab, "merges": merges, "unk_token": renamed.get(unknown, unknown)}


def _content_bytes(content: str, byte_level: bool, control: bool) -> bytes:
    """The bytes that a token stands for; in byte-level models added tokens are not spelt."""
    if byte_level and (control or not all(letter in BYTE_OF_LETTER for letter in content)):
        return content.encode("utf-8")
    if byte_level:
        return bytes(BYTE_OF_LETTER[letter] for letter in content)
    if len(content) == 6 and content.startswith("<0x") and content.endswith(">"):
        return bytes.fromhex(content[3:5])
    return content.replace(_SPACE, " ").encode("utf-8")
