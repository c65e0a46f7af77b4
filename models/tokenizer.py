"""Text to token ids and back, for template text and for untrusted text.

Two encoders come from one `tokenizer.json`. The template encoder recognises added tokens (control
tokens such as `<|im_end|>`, but also the whitespace runs that Gemma adds). The text encoder is
rebuilt without any of them: their entries in the model's vocabulary are renamed to random strings,
which keeps all ids in place, and merges that lead to them are dropped. So `<|im_end|>` in untrusted
text becomes ordinary pieces. Neither encoder adds, pads or truncates anything.

Byte-level BPE and Unigram models and SentencePiece-style BPE and Unigram models with byte fallback
are understood: these encode every text (a normalizer, where tokenizer.json has one, still applies;
Qwen's is NFC). Others are refused, as are tokenizers that put a space of their own before the text.

It does not render chat templates.
"""

import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers

from models.config import read_json

_SPACE = "\u2581"  # SentencePiece's visible space
# All bytes but those that UTF-8 never uses: a vocabulary may do without these 13.
_UTF8_BYTES = frozenset(range(0xF5)) - {0xC0, 0xC1}


class Tokenizer:
    """The tokenizer of a model directory.

    special_ids: ids of added tokens marked special, which decode to nothing. control_ids: ids of
    all added tokens, which untrusted text cannot yield. token_bytes: the raw bytes of each id, b""
    for special ids and for ids without a token. size: the largest id + 1. special_tokens: strings
    by role ("bos_token", "eos_token", ...), as chat templates name them. chat_template: Jinja
    source or None.
    """

    special_ids: frozenset[int]
    control_ids: frozenset[int]
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
        data = read_json(path)
        config = read_json(config_path) if config_path.exists() else {}
        if "auto_map" in config:
            raise ValueError(f"{config_path}: auto_map names code to run, which is refused")
        self.special_tokens = _special_tokens(config)
        self.chat_template = _chat_template(config_path, config)

        vocab = _vocab(path, data)
        byte_level = _is_byte_level(path, data)
        _require_total(path, data, vocab, byte_level)
        added = _added_tokens(path, data, vocab, self.special_tokens.values())
        self.control_ids = frozenset(token["id"] for token in added)
        self.special_ids = frozenset(token["id"] for token in added if token["special"])
        contents = {token: content for content, token in vocab.items()}
        contents |= {token["id"]: token["content"] for token in added}
        self.size = max(contents) + 1
        self.token_bytes = [b""] * self.size
        for token, content in contents.items():
            if token not in self.special_ids:
                self.token_bytes[token] = _content_bytes(content, byte_level)

        plain = data | {"post_processor": None, "truncation": None, "padding": None}
        self._template = _build(path, plain | {"added_tokens": added})
        for token in added:
            if self._template.token_to_id(token["content"]) != token["id"]:
                raise ValueError(f"{path}: added token {token['content']!r} has a contested id")
        model = _without_control(data["model"], self.control_ids)
        self._text = _build(path, plain | {"added_tokens": [], "model": model})

    def encode_template(self, text: str) -> list[int]:
        """Ids of trusted text: added tokens are recognised; no BOS or EOS is added."""
        _require_unicode(text)
        return self._template.encode(text, add_special_tokens=False).ids

    def encode_text(self, text: str) -> list[int]:
        """Ids of untrusted text: no control id can appear, whatever the text.

        Raises ValueError for lone surrogates, which have no UTF-8 form.
        """
        _require_unicode(text)
        ids = self._text.encode(text, add_special_tokens=False).ids
        assert self.control_ids.isdisjoint(ids), "a control id in untrusted text"
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special ones skipped; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._bytes_of(token) for token in ids).decode("utf-8", errors="replace")

    def _bytes_of(self, token: int) -> bytes:
        if not 0 <= token < self.size:
            raise ValueError(f"token id {token} is outside the tokenizer's {self.size}")
        return self.token_bytes[token]


def _build(path: Path, data: dict[str, Any]) -> tokenizers.Tokenizer:
    tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    return tokenizer


def _require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f"text holds a lone surrogate U+{code:04X} at {error.start}") from None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    found = {}
    for key, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            found[key] = content
    return found


def _chat_template(config_path: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja before tokenizer_config.json, as transformers reads them."""
    jinja = config_path.with_name("chat_template.jinja")
    if jinja.exists():
        return jinja.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{config_path}: chat_template must be text, got {template!r}")
    return template


def _vocab(path: Path, data: dict[str, Any]) -> dict[str, int]:
    """The model's own vocabulary; added tokens may or may not be in it."""
    model = data.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind not in ("BPE", "Unigram"):
        raise ValueError(f"{path}: model type {kind!r} is not supported (only BPE, Unigram)")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{path}: model.{key} {model[key]!r} is not supported")
    if kind == "BPE":
        return dict(model["vocab"])
    vocab = {piece: token for token, (piece, _) in enumerate(model["vocab"])}
    if len(vocab) != len(model["vocab"]):
        raise ValueError(f"{path}: model.vocab repeats a piece")
    return vocab


def _steps(value: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, with sequences unrolled."""
    if isinstance(value, dict) and value.get("type") == "Sequence":
        for key in ("normalizers", "pretokenizers", "decoders"):
            for step in value.get(key, []):
                yield from _steps(step)
    elif isinstance(value, dict):
        yield value


def _is_byte_level(path: Path, data: dict[str, Any]) -> bool:
    """Whether tokens are spelt in the byte alphabet (else SentencePiece's); others raise."""
    before = [*_steps(data.get("normalizer")), *_steps(data.get("pre_tokenizer"))]
    for step in before:
        if (
            step["type"] == "Prepend"
            or step.get("add_prefix_space")
            or step.get("prepend_scheme", "never") != "never"
        ):
            raise ValueError(f"{path}: {step['type']} puts a space before text: not supported")
    decoder = list(_steps(data.get("decoder")))
    kinds = [step["type"] for step in decoder]
    spelt = any(step["type"] == "ByteLevel" for step in before)
    if spelt and kinds == ["ByteLevel"]:
        return True
    visible = any(
        step["type"] == "Metaspace"
        or (step["type"] == "Replace" and step["pattern"] == {"String": _SPACE})
        for step in decoder
    )
    if not spelt and visible:
        return False
    raise ValueError(f"{path}: decoder {kinds} is not supported")


def _require_total(
    path: Path, data: dict[str, Any], vocab: dict[str, int], byte_level: bool
) -> None:
    """Raise if some text has no encoding: a byte without a token would be lost or unknown."""
    if byte_level:
        needed = {letter for letter, byte in BYTE_OF_LETTER.items() if byte in _UTF8_BYTES}
    else:
        needed = {f"<0x{byte:02X}>" for byte in _UTF8_BYTES}
        if not data["model"].get("byte_fallback"):
            raise ValueError(f"{path}: without byte_fallback some text cannot be encoded")
    missing = sorted(needed - vocab.keys())
    if missing:
        raise ValueError(f"{path}: no token for the byte {missing[0]!r} ({len(missing)} in all)")


def _added_tokens(
    path: Path, data: dict[str, Any], vocab: dict[str, int], named: Iterable[str]
) -> list[dict[str, Any]]:
    """The added tokens, together with special tokens that only tokenizer_config.json marks."""
    added = list(data.get("added_tokens") or [])
    known = {token["content"] for token in added}
    for content in dict.fromkeys(named):
        if content in known:
            continue
        if content not in vocab:
            raise ValueError(f"{path}: has no token {content!r}, named in tokenizer_config.json")
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added.append({"id": vocab[content], "content": content, "special": True, **flags})
    return added


def _without_control(model: dict[str, Any], control_ids: frozenset[int]) -> dict[str, Any]:
    """The model with the entries of control ids renamed to strings that no text can hold."""

    def unguessable() -> str:
        return f"\0{secrets.token_hex(16)}"

    if model["type"] == "Unigram":
        vocab = [
            [unguessable(), score] if token in control_ids else [piece, score]
            for token, (piece, score) in enumerate(model["vocab"])
        ]
        return model | {"vocab": vocab}
    renamed = {
        content: unguessable() for content, token in model["vocab"].items() if token in control_ids
    }
    merges = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if renamed.keys().isdisjoint((left, right, left + right)):
            merges.append(merge)
    vocab = {renamed.get(content, content): token for content, token in model["vocab"].items()}
    unknown = model.get("unk_token")
    return model | {"vocab": vocab, "merges": merges, "unk_token": renamed.get(unknown, unknown)}


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 letters stand for themselves, the rest for U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_of_letter()


def _content_bytes(content: str, byte_level: bool) -> bytes:
    if byte_level:
        if all(letter in BYTE_OF_LETTER for letter in content):
            return bytes(BYTE_OF_LETTER[letter] for letter in content)
        return content.encode("utf-8")  # an added token with letters of its own
    if len(content) == 6 and content.startswith("<0x") and content.endswith(">"):
        return bytes.fromhex(content[3:5])
    return content.replace(_SPACE, " ").encode("utf-8")
