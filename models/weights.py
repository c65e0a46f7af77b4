"""Loading and saving of safetensors checkpoints under their Hugging Face tensor names.

A checkpoint is `model.safetensors`, or shards listed in `model.safetensors.index.json`. Its q, k, v
and gate, up tensors, and those of experts, are read straight into their rows of the fused
parameters, a block at a time; saving splits them again, one tensor in memory at a time. The names
in the files must be exactly the names the decoder needs: every tensor is consumed once, and none is
missing, left over, repeated, misshapen or not finite. Two exceptions: `rotary_emb.inv_freq` of old
checkpoints is ignored, because it follows from config.json; `lm_head.weight` beside a tied
embedding is accepted if it equals the embedding, though not in a scalar model, whose only head is
`score.weight`.

Of a model that sees images the text model is read, and what is saved is that alone. The decoder of
a critique model is stored under another name (`models/critique_model.py`).

It does not read pickles, quantised or integer tensors.
"""

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.config import ModelConfig, hf_config
from models.critique_model import CritiqueModel
from models.files import parse_json, read_json
from models.layers import Linear
from models.scalar_head import ScalarModel, decoder_of
from models.transformer import Transformer

Model = TypeVar("Model", Transformer, ScalarModel, CritiqueModel)
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_STORED_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _STORED_DTYPES.items()}
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# Of a model that sees images: its text model, in the old spelling and in the new, and the rest.
_TEXT = re.compile(r"(language_model\.model|model\.language_model)\.")
_IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
_BLOCK = 1 << 22  # elements of a tensor that are converted, checked and copied together
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SCORE = "score.weight"
_BASE = "reward_base_model."  # of a critique model: its decoder


@dataclass(frozen=True)
class _Slot:
    """Where a stored tensor belongs: rows [start, start + shape[0]) of a parameter, or of one
    expert's part of it, in the order of `rows` where that is not their own: row rows[i] of what is
    stored is the i-th."""

    parameter: str
    start: int
    shape: tuple[int, ...]
    rows: Tensor | None = None
    expert: int | None = None

    def of(self, parameters: dict[str, Tensor]) -> Tensor:
        whole = parameters[self.parameter].detach()
        own = whole if self.expert is None else whole[self.expert]
        return own[self.start : self.start + self.shape[0]]

    def blocks(
        self, stored: Tensor, parameters: dict[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows of a stored tensor after others, and where they belong."""
        place, step = self.of(parameters), max(1, _BLOCK // max(1, math.prod(self.shape[1:])))
        for start in range(0, len(stored), step):
            here = slice(start, start + step)
            yield stored[here if self.rows is None else self.rows[here]], place[here]

    def saved(self, parameters: dict[str, Tensor]) -> Tensor:
        """What is stored of these parameters."""
        return in_stored_order(self.of(parameters), self.rows)


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is stored, from a file's header, and its name there."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def load_weights(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Transformer:
    """Build the decoder of `config` and fill it from the safetensors of a directory.

    dtype: of the parameters; None takes config.dtype or, where that is None, the stored dtype of
    the embedding, float32 for float64. The config of the model names the dtype it was given.
    Raises ValueError naming the file and the tensor for every fault in the module docstring.
    """
    with torch.device("meta"):
        model = Transformer(config)
    return _load(model, Path(directory), dtype, device)


def load_scalar_weights(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> ScalarModel:
    """`load_weights` of a scalar model, whose config was read as one."""
    with torch.device("meta"):
        model = ScalarModel(config)
    return _load(model, Path(directory), dtype, device)


def load_critique_weights(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> CritiqueModel:
    """`load_weights` of a critique model; config: its base's."""
    with torch.device("meta"):
        model = CritiqueModel(config)
    return _load(model, Path(directory), dtype, device)


def _load(model: Model, root: Path, dtype: torch.dtype | None, device: str | torch.device) -> Model:
    """Give a model of the meta device its place and its weights."""
    decoder = decoder_of(model)
    config = decoder.config
    stored: dict[str, _Stored] = _stored_tensors(root)
    slots = dict(_slots(model))
    may_repeat = config.tied and not isinstance(model, ScalarModel)
    if may_repeat and _HEAD in stored:
        slots[_HEAD] = slots[_EMBEDDING]
    _check_names(root, stored, slots)

    dtype = dtype or config.dtype or _loaded_as(stored[_EMBEDDING].dtype)
    if dtype not in _STORED_DTYPES.values():
        raise ValueError(f"dtype {dtype} is not supported")
    decoder.config = replace(config, dtype=dtype)
    model = model.to(dtype).to_empty(device=device)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    # The embedding comes first, so that a tied head can be compared with it.
    for path in dict.fromkeys([stored[_EMBEDDING].path, *(s.path for s in stored.values())]):
        names = sorted(name for name in slots if stored[name].path == path)
        if _EMBEDDING in names:
            names.sort(key=lambda name: name != _EMBEDDING)
        places = {name: (stored[name].name, slots[name]) for name in names}
        _read_file(path, places, parameters, dtype, repeated=_HEAD if may_repeat else None)
    return model


def _read_file(
    path: Path,
    places: Mapping[str, tuple[str, _Slot]],
    parameters: dict[str, Tensor],
    dtype: torch.dtype,
    repeated: str | None,
) -> None:
    """Fill the places of a file's tensors, each with its name there, block by block from mapped
    pages: nothing as large as a tensor is allocated, and no page stays mapped. The tensor that is
    `repeated` has to be in its place already."""

    def put(name: str, own: Tensor, place: Tensor) -> None:
        if name == repeated:
            if not torch.equal(own, place.cpu()):
                raise ValueError(f"{path}: {name} differs from the tied embedding")
        # `isfinite` of all elements, without its temporaries.
        elif not all(math.isfinite(each) for each in torch.aminmax(own)):
            raise ValueError(f"{path}: {name} is not finite in {dtype}")
        else:
            place.copy_(own)

    try:
        with safe_open(path, "pt", device="cpu") as file:
            for name, (own_name, slot) in places.items():
                for own, target in slot.blocks(file.get_tensor(own_name), parameters):
                    put(name, own.to(dtype), target)
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None


def _loaded_as(stored: torch.dtype) -> torch.dtype:
    """Nothing is sampled in float64."""
    return torch.float32 if stored == torch.float64 else stored


def stored_dtype(directory: str | os.PathLike[str]) -> torch.dtype:
    """The dtype of a checkpoint's embedding, float32 for float64. Raises ValueError for a directory
    whose files cannot be read as `load_weights` reads them."""
    return _loaded_as(_stored_tensors(Path(directory))[_EMBEDDING].dtype)


def save_pretrained(
    model: Transformer | ScalarModel,
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `config.json` and one `model.safetensors`, which transformers opens as well. The
    weights of an adapted model are merged, one after another.

    base: the model directory that the decoder was loaded from; what its config.json says is kept,
    fields included that nothing here reads (see `hf_config`). Without one the file holds what this
    decoder needs to know. dtype: of the written weights, which config.json names; None: the
    model's. Each file is written beside its place, synced and renamed, the weights last. Tokenizer
    and generation settings are the caller's to write. Raises ValueError as `read_json` does.
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    decoder = decoder_of(model)
    kind = dtype or decoder.embed_tokens.weight.dtype
    config = replace(decoder.config, dtype=kind)
    began_as = None if base is None else read_json(Path(base) / "config.json")
    text = json.dumps(hf_config(config, isinstance(model, ScalarModel), began_as), indent=2) + "\n"
    with torch.device("meta"):
        plain = type(model)(decoder.config)
    slots = dict(_slots(plain))
    shapes = {name: (kind, slot.shape) for name, slot in slots.items()}

    @lru_cache(maxsize=1)  # the projections that are fused are asked for in turn
    @torch.no_grad()
    def merged(name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, Linear) and leaf == "weight":
            return module.merged()
        return model.get_parameter(name)

    def tensor_of(name: str) -> Tensor:
        place = slots[name]
        return place.saved({place.parameter: merged(place.parameter)})

    replace_file(root / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
    replace_file(
        root / _SINGLE,
        lambda path: write_tensors(path, shapes, tensor_of),
    )


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write a safetensors file, one tensor after another, and return its SHA-256 in hex.

    shapes: the dtype and the shape that each tensor has in the file, by name. tensor_of: gives one
    of them, of any dtype and on any device, when its turn has come. So there is never a copy of
    more than one. metadata: of the file, for its readers.
    """
    # The widest come first: then each begins at a multiple of its width.
    names = sorted(shapes, key=lambda name: -shapes[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        dtype, shape = shapes[name]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: Any) -> None:
            file.write(data)
            digest.update(data)

        put(len(text).to_bytes(8, "little") + text)
        for name in names:
            dtype, shape = shapes[name]
            tensor = tensor_of(name).detach()
            assert tensor.shape == torch.Size(shape), name
            put(tensor.to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file by what `write` puts into a temporary one, durably or not at all."""
    # Two machines that share the directory may have processes of one number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write(temporary)
        for place, target in ((temporary, path), (path.parent, None)):
            handle = os.open(place, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            if target is not None:
                os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def stored_rows(config: ModelConfig, module: str, rows: int) -> dict[str, int]:
    """The projections that checkpoints store by themselves, in order, with the number of their
    rows: those of a fused one, or the module itself. rows: of the module."""
    if module == "gate_up_proj":
        return {"gate_proj": rows // 2, "up_proj": rows // 2}
    if module != "qkv_proj":
        return {module: rows}
    if (latent := config.latent) is not None:
        q = {"q_proj": config.num_heads * config.head_dim}
        if latent.q_rank is not None:
            q = {"q_a_proj": latent.q_rank}
        return q | {"kv_a_proj_with_mqa": latent.kv_rank + latent.rope_dim}
    return {
        "q_proj": config.num_heads * config.head_dim,
        "k_proj": config.num_kv_heads * config.head_dim,
        "v_proj": config.num_kv_heads * config.v_head_dim,
    }


def row_order(config: ModelConfig, projection: str) -> Tensor | None:
    """Which stored row is the i-th of a projection, None for all in their order. With latent
    attention checkpoints turn channels 2i and 2i + 1 of a head together, and the decoder i and i +
    half."""
    latent = config.latent
    if latent is None or projection not in ("q_proj", "q_b_proj", "kv_a_proj_with_mqa"):
        return None
    turned = torch.arange(latent.rope_dim).unflatten(0, (-1, 2)).T.flatten()
    heads, before = config.num_heads, latent.nope_dim
    if projection == "kv_a_proj_with_mqa":
        heads, before = 1, latent.kv_rank
    head = torch.cat([torch.arange(before), before + turned])
    return (torch.arange(heads)[:, None] * len(head) + head).flatten()


def in_stored_order(rows: Tensor, order: Tensor | None) -> Tensor:
    """A projection's rows as checkpoints and adapters store them. order: its `row_order`."""
    return rows if order is None else rows[order.argsort().to(rows.device)]


def _slots(model: Transformer | ScalarModel | CritiqueModel) -> Iterator[tuple[str, _Slot]]:
    """Every Hugging Face tensor name of a model with its place in the fused parameters."""
    config = decoder_of(model).config
    for name, parameter in model.named_parameters():
        stored_name = name
        if isinstance(model, CritiqueModel):
            stored_name = name.replace("model." + _HEAD, _HEAD)
        elif isinstance(model, Transformer) and name != _HEAD:
            stored_name = "model." + name
        places: list[tuple[int | None, str]] = [(None, stored_name)]
        module, sizes = name.split(".")[-2], parameter.shape
        if parameter.ndim == 3:  # of all experts
            parent, _, module = stored_name.rpartition(".")
            places = [(i, f"{parent}.{i}.{module}.weight") for i in range(len(parameter))]
            sizes = sizes[1:]
        for expert, place in places:
            start = 0
            for part, rows in stored_rows(config, module, sizes[0]).items():
                shape, order = (rows, *sizes[1:]), row_order(config, part)
                slot = _Slot(name, start, shape, order, expert)
                yield place.replace(module, part), slot
                start += rows
            assert start == sizes[0], name


def _check_names(root: Path, stored: dict[str, _Stored], slots: dict[str, _Slot]) -> None:
    """Raise unless names and shapes in the files are exactly those of the decoder."""
    missing = sorted(slots.keys() - stored.keys())
    if missing == [_HEAD]:
        raise ValueError(
            f"{root}: missing tensor {_HEAD}, which tie_word_embeddings of config.json does not "
            "replace by the embedding"
        )
    if missing:
        raise ValueError(f"{root}: missing tensor {missing[0]} ({len(missing)} missing in all)")
    for name, tensor in stored.items():
        if name not in slots:
            raise ValueError(f"{tensor.path}: extra tensor {name}")
        if tensor.shape != slots[name].shape:
            raise ValueError(
                f"{tensor.path}: {name} must have shape {slots[name].shape}, got {tensor.shape}"
            )


def _stored_tensors(root: Path) -> dict[str, _Stored]:
    """Every tensor of the checkpoint, from the headers of its files; buffers ignored."""
    index, single = root / _INDEX, root / _SINGLE
    if index.exists():
        stored = _indexed_tensors(index)
        if single.exists() and all(tensor.path != single for tensor in stored.values()):
            raise ValueError(f"{single}: not in {_INDEX} beside it; remove one of the two")
    elif single.exists():
        stored = _header(single)
    else:
        pickles = sorted(path for pattern in _PICKLES for path in root.glob(pattern))
        if pickles:
            raise ValueError(f"{pickles[0]}: pickled weights are refused, convert to safetensors")
        raise ValueError(f"{root}: holds neither {_SINGLE} nor {_INDEX}")
    stored = {name.removeprefix(_BASE): tensor for name, tensor in stored.items()}
    stored = {name: tensor for name, tensor in stored.items() if not _IGNORED.fullmatch(name)}
    if not any(_TEXT.match(name) for name in stored):
        return stored
    texts = {name: each for name, each in stored.items() if not _IMAGES.match(name)}
    return {_TEXT.sub("model.", name).removeprefix("language_model."): each
            for name, each in texts.items()}  # fmt: skip


def _indexed_tensors(index: Path) -> dict[str, _Stored]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must be an object that names tensors")
    _require_printable(index, weight_map)
    stored: dict[str, _Stored] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        for name, tensor in _header(_shard_path(index, shard)).items():
            if name in stored:
                raise ValueError(f"{tensor.path}: {name} is also in {stored[name].path.name}")
            if weight_map.get(name) != shard:
                raise ValueError(
                    f"{tensor.path}: extra tensor {name}, which {_INDEX} "
                    f"{'does not name' if name not in weight_map else 'puts elsewhere'}"
                )
            stored[name] = tensor
    missing = sorted(weight_map.keys() - stored.keys())
    if missing:
        raise ValueError(f"{index}: {missing[0]} is missing from {weight_map[missing[0]]!r}")
    return stored


def _shard_path(index: Path, shard: str) -> Path:
    """The path of a shard; it must be a plain safetensors file name inside the directory.

    A link may lead elsewhere only within a Hugging Face cache: snapshots/REVISION/ to blobs/.
    """
    if not shard.endswith(".safetensors"):
        raise ValueError(f"{index}: {shard!r} is not a safetensors file")
    if shard != os.path.basename(shard) or "\\" in shard or "\0" in shard:
        raise ValueError(f"{index}: {shard!r} leaves the directory")
    path, root = index.parent / shard, index.parent.resolve()
    inside = [root]
    if root.parent.name == "snapshots":
        inside.append(root.parent.parent / "blobs")
    if path.resolve().parent not in inside:
        raise ValueError(f"{index}: {shard!r} is a link that leaves the directory")
    if not path.is_file():
        raise ValueError(f"{index}: {shard!r} does not exist")
    return path


def _header(path: Path) -> dict[str, _Stored]:
    """Names, dtypes and shapes in a safetensors file: 8 bytes of length, JSON, data."""
    if not path.is_file():
        raise ValueError(f"{path}: weights must be in a file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path}: truncated: {size} bytes hold no header of {length}")
        header = parse_json(path, file.read(length))
    header.pop("__metadata__", None)
    _require_printable(path, header)
    stored, end = {}, 0
    for name, entry in header.items():
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: {name} is not described by an object")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if dtype not in _STORED_DTYPES:
            raise ValueError(f"{path}: {name} has dtype {dtype!r}, which is not supported")
        if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"{path}: {name} has a malformed shape or data_offsets")
        stored[name] = _Stored(path, name, _STORED_DTYPES[dtype], tuple(shape))
        end = max(end, offsets[1])
    if end != size - 8 - length:
        raise ValueError(
            f"{path}: truncated or overlong: {size - 8 - length} bytes of data, {end} described"
        )
    return stored


def _require_printable(path: Path, names: Iterable[str]) -> None:
    """Messages show the names of tensors, which come from a file: none may steer a terminal."""
    for name in names:
        if not name.isprintable():
            raise ValueError(f"{path}: {name!r} is no name of a tensor")


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
