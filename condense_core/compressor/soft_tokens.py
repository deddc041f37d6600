"""`SoftTokens`: what a compressor makes of a context, and the bytes in which it travels.

The wire format is a safetensors file with a dense tensor `embeds [k, d_model]`, behind it the UTF-8 of a kept
text, if there is one, as a tensor `text` of bytes, and string metadata: the other fields of `SoftTokens`, a
SHA-256 of the tensors' bytes and a SHA-256 of everything else in the header. The bytes come from strangers, so
sizes, shape, type and counts are checked before anything is allocated, the digests and finiteness before
anything is returned, and nothing is ever unpickled. The digests find damage, not forgery: whoever can write a
file can write its digests.

Soft tokens are a lossy encoding of the context, not an encryption of it. Those of `select` are rows of the
model's own table of embeddings: they spell the words that were kept to whoever has the model, whether or not
the file also holds these as text.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from condense_core.compressor.config import num_kept
from condense_core.decoder.identity import mismatch
from condense_core.files.atomic import naming, regular_size, write_atomically
from condense_core.files.headers import canonical_json, header_length, parse_header

FORMAT = "condense-soft-tokens"
FORMAT_VERSION = "1"

DEFAULT_MAX_BYTES = 256 * 2**20
"""Largest file or message read unless the caller says otherwise: 32,768 soft tokens of width 4,096 in 16
bits."""
MAX_HEADER_BYTES = 16 * 2**10
MAX_SOFT_TOKENS = 2**20
MAX_D_MODEL = 2**16
MAX_CONTEXT_TOKENS = 2**28
MAX_NAME_CHARS = 512
MAX_TEXT_BYTES = 64 * 2**20

_DTYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {code: dtype for dtype, code in _DTYPE_CODES.items()}
_FIELDS = ("num_context_tokens", "ratio", "model_id", "model_revision", "method", "context_sha256", "model_digest")
_OPTIONAL = {"model_digest"}  # left out where it is not known, as in files of earlier releases
_METADATA_KEYS = {"format", "format_version", "dtype", "payload_sha256", "metadata_sha256", *_FIELDS}


class SoftTokensError(ValueError):
    """Soft tokens are damaged, foreign, out of bounds, or made for another model; the message is one line."""


@dataclass(frozen=True, eq=False, repr=False)
class SoftTokens:
    """A compressed context, in the input-embedding space of one model.

    Attributes:
        embeds: `[k, d_model]` float32, bfloat16 or float16; k = ceil(num_context_tokens / ratio).
        num_context_tokens: tokens of the context before compression.
        ratio: context tokens per soft token; an int, or a float that is none, such as 2.5.
        model_id: the model whose embedding space this is: a hub id or the name of a folder.
        model_revision: revision of that model, "" when unknown.
        method: the compressor that made them.
        context_sha256: SHA-256 of the context's UTF-8 text in lower-case hex, or "".
        model_digest: digest of that model's weights, which decides whether another model may read these; "" when
            unknown, and then the names decide.
        text: what was kept of the context, as text, where tokens were kept (`select`); else "". Files hold it too;
            `dataclasses.replace(soft, text="")` leaves it out.

    Raises:
        SoftTokensError: a field is of the wrong type or out of bounds. Values are not read here, which would
            wait for the device; NaN and infinities are refused where soft tokens are written, read and used.
    """

    embeds: Tensor
    num_context_tokens: int
    ratio: float
    model_id: str
    model_revision: str = ""
    method: str = "pool"
    context_sha256: str = ""
    model_digest: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.embeds, Tensor) or self.embeds.layout != torch.strided:
            _fail(f"embeds is {_kind(self.embeds)}, expected a dense tensor [k, d_model]")
        if self.embeds.dtype not in _DTYPE_CODES:
            _fail(f"embeds has dtype {self.embeds.dtype}, expected float32, bfloat16 or float16")
        _check_fields({name: getattr(self, name) for name in _FIELDS})
        _check_text(self.text)
        _check_shape(tuple(self.embeds.shape), self.num_context_tokens, self.ratio)

    @property
    def num_soft_tokens(self) -> int:
        """k, the number of soft tokens."""
        return self.embeds.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the model's input embeddings."""
        return self.embeds.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the embeddings, without metadata."""
        return self.embeds.nbytes

    def __len__(self) -> int:
        return self.num_soft_tokens

    def __repr__(self) -> str:
        dtype = str(self.embeds.dtype).removeprefix("torch.")
        return (
            f"SoftTokens({self.num_context_tokens} tokens -> {len(self)} x {self.d_model} {dtype}, "
            f"ratio={self.ratio}, method={self.method!r}, model_id={self.model_id!r}, "
            f"device='{self.embeds.device}')"
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "SoftTokens":
        """The same soft tokens on another device or in another of the three dtypes; self when nothing changes."""
        moved = self.embeds.to(device=device, dtype=dtype)
        return self if moved is self.embeds else replace(self, embeds=moved)

    def check_finite(self) -> None:
        """Raise SoftTokensError if an embedding is NaN or infinite; waits for the device."""
        embeds = self.embeds.detach()
        # One pass where all is well: NaN passes through the extremes, and an infinity is one of them.
        if not embeds.numel() or torch.isfinite(torch.stack(torch.aminmax(embeds))).all():
            return
        bad_rows = (~torch.isfinite(embeds)).any(dim=1).nonzero()
        if len(bad_rows):
            _fail(
                f"embeds has NaN or infinite values in {len(bad_rows)} of {len(self)} soft tokens "
                f"(the first is {int(bad_rows[0])}), expected finite ones"
            )

    def check_model(self, model_id: str, d_model: int, model_digest: str = "") -> None:
        """Raise SoftTokensError unless these were made for the model of this name, width and digest of weights.

        The digests decide where both are known, else the last parts of the names (a hub id and a local copy).
        """
        if reason := mismatch(self.model_id, self.model_digest, model_id, model_digest):
            _fail(f"soft tokens were {reason}: compress again")
        if self.d_model != d_model:
            _fail(f"soft tokens are {self.d_model} wide, expected {d_model}, the width of {model_id!r}")

    def to_bytes(self) -> bytes:
        """Serialise; equal soft tokens give equal bytes, on every machine.

        Raises:
            SoftTokensError: a value is NaN or infinite.
        """
        self.check_finite()
        dense = self.embeds.detach().to("cpu").contiguous()
        size, text = dense.nbytes, self.text.encode()
        parts = (dense.view(torch.uint8).numpy().reshape(-1).data, text)  # copied once, into the file
        code = _DTYPE_CODES[dense.dtype]
        metadata = {name: str(getattr(self, name)) for name in _FIELDS}
        metadata = {name: text for name, text in metadata.items() if text or name not in _OPTIONAL}
        metadata |= {"format": FORMAT, "format_version": FORMAT_VERSION, "dtype": code}
        digest = hashlib.sha256(parts[0])
        digest.update(text)
        metadata["payload_sha256"] = digest.hexdigest()
        metadata["metadata_sha256"] = _metadata_digest(metadata, tuple(dense.shape))
        entries = {"embeds": {"dtype": code, "shape": list(dense.shape), "data_offsets": [0, size]}}
        if text:
            entries["text"] = {"dtype": "U8", "shape": [len(text)], "data_offsets": [size, size + len(text)]}
        header = canonical_json({"__metadata__": metadata, **entries})
        header += b" " * (-len(header) % 8)  # safetensors aligns the data so
        return b"".join((len(header).to_bytes(8, "little"), header, *parts))

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, *, max_bytes: int = DEFAULT_MAX_BYTES) -> Self:
        """Read what `to_bytes` wrote, trusting nothing.

        Args:
            data: the serialised soft tokens.
            max_bytes: refuse more than this.

        Returns:
            Soft tokens on the CPU that share no memory with `data`.

        Raises:
            SoftTokensError: `data` is too large, truncated, damaged, of another format or out of bounds.
            TypeError: `data` is not bytes-like.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data is a {type(data).__name__}, expected bytes")
        view = memoryview(data).cast("B")
        if len(view) > max_bytes:
            _fail(f"{len(view):,} bytes, expected at most {max_bytes:,}")
        header, payload = _split(view)
        metadata, code, shape, size, text_size = _check_header(header)
        if len(payload) != size + text_size:
            behind = f" and {text_size:,} bytes of text" if text_size else ""
            _fail(
                f"{len(payload):,} bytes of tensor data, expected {size + text_size:,} for {list(shape)} {code}{behind}"
            )
        if _metadata_digest(metadata, shape) != metadata["metadata_sha256"]:
            _fail("the metadata does not match its SHA-256: damaged or changed after it was written")
        if hashlib.sha256(payload).hexdigest() != metadata["payload_sha256"]:
            _fail("the tensor data does not match its SHA-256: damaged or changed after it was written")
        embeds = torch.frombuffer(bytearray(payload[:size]), dtype=_DTYPES[code]).reshape(shape)
        try:
            text = bytes(payload[size:]).decode()
        except UnicodeDecodeError as error:
            _fail(f"the text is not UTF-8 ({error.reason} at byte {error.start})")
        soft = cls(embeds, **_parse_fields(metadata), text=text)
        soft.check_finite()
        return soft

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to `path`; on failure a file that stood there before is untouched, and nothing is left behind.

        Raises:
            SoftTokensError: a value is NaN or infinite.
            OSError: the file cannot be written; the message names it.
        """
        write_atomically(path, self.to_bytes(), "soft tokens")

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, max_bytes: int = DEFAULT_MAX_BYTES) -> Self:
        """Read a file that `save` wrote.

        Raises:
            SoftTokensError: as from `from_bytes`; the message names the file.
            OSError: the file cannot be read; the message names it.
        """
        path = Path(path)
        with naming("read soft tokens from", path):
            size = regular_size(path)
            if size > max_bytes:
                raise SoftTokensError(f"{path}: {size:,} bytes, expected at most {max_bytes:,}")
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)  # it may have grown since
        try:
            return cls.from_bytes(data, max_bytes=max_bytes)
        except SoftTokensError as error:
            raise SoftTokensError(f"{path}: {error}") from None


def _fail(message: str) -> NoReturn:
    raise SoftTokensError(message)


def _kind(value: object) -> str:
    return f"a {type(value).__name__}" if not isinstance(value, Tensor) else f"a {value.layout} tensor"


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Types and bounds of everything but the tensor."""
    for name in ("num_context_tokens", "ratio"):
        value = fields[name]
        fraction = name == "ratio" and isinstance(value, float) and not value.is_integer()
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole or fraction) or not 1 <= value <= MAX_CONTEXT_TOKENS:
            kinds = "an int or a fraction" if name == "ratio" else "an int"
            _fail(f"{name} is {value!r:.80}, expected {kinds} in [1, {MAX_CONTEXT_TOKENS:,}]")
    for name, minimum in (("model_id", 1), ("model_revision", 0), ("method", 1)):
        value = fields[name]
        if not isinstance(value, str) or not minimum <= len(value) <= MAX_NAME_CHARS or not value.isprintable():
            _fail(f"{name} is {value!r:.80}, expected {minimum} to {MAX_NAME_CHARS} printable characters")
    for name in ("context_sha256", "model_digest"):
        digest = fields[name]
        if not isinstance(digest, str) or not re.fullmatch(r"([0-9a-f]{64})?", digest):
            _fail(f"{name} is {digest!r:.80}, expected 64 lower-case hex digits or nothing")


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        _fail(f"text is {_kind(text)}, expected a str")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        _fail(f"text is not valid Unicode ({error.reason} at {error.start})")
    if size > MAX_TEXT_BYTES:
        _fail(f"text has {size:,} bytes, expected at most {MAX_TEXT_BYTES:,}")


def _check_shape(shape: tuple[int, ...], num_context_tokens: int, ratio: float) -> None:
    if len(shape) != 2 or not 1 <= shape[0] <= MAX_SOFT_TOKENS or not 1 <= shape[1] <= MAX_D_MODEL:
        _fail(f"embeds has shape {list(shape)}, expected [1 to {MAX_SOFT_TOKENS:,}, 1 to {MAX_D_MODEL:,}]")
    expected = num_kept(num_context_tokens, ratio)
    if shape[0] != expected:
        _fail(
            f"embeds has {shape[0]} soft tokens, expected {expected} for {num_context_tokens} context tokens "
            f"at ratio {ratio}"
        )


def _split(view: memoryview) -> tuple[bytes, memoryview]:
    """Header and tensor data of a safetensors file."""
    try:
        length = header_length(bytes(view[:9]), len(view), limit=MAX_HEADER_BYTES, expected="soft tokens")
    except ValueError as error:
        _fail(str(error))
    return bytes(view[8 : 8 + length]), view[8 + length :]


def _check_header(header: bytes) -> tuple[dict[str, str], str, tuple[int, int], int, int]:
    """Parse and check a header; returns metadata, dtype code, shape, and the bytes of embeddings and of text."""
    try:
        content = parse_header(header)
    except ValueError as error:
        _fail(str(error))
    if not isinstance(content, dict) or set(content) - {"text"} != {"__metadata__", "embeds"}:
        names = sorted(content) if isinstance(content, dict) else []
        _fail(f"the file holds {str(names)[:120]}, expected one tensor 'embeds' and metadata")
    metadata, entry = content["__metadata__"], content["embeds"]
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _fail("the metadata is not a table of strings")
    if metadata.get("format") != FORMAT:
        _fail(f"format is {metadata.get('format')!r:.80}, expected {FORMAT!r}: some other safetensors file")
    if metadata.get("format_version") != FORMAT_VERSION:
        _fail(f"format_version is {metadata.get('format_version')!r:.80}, expected {FORMAT_VERSION!r}")
    if odd := sorted((set(metadata) ^ _METADATA_KEYS) - (_OPTIONAL - set(metadata))):
        _fail(f"metadata keys are missing or unknown: {str(odd)[:120]}")
    for name in ("payload_sha256", "metadata_sha256"):
        if not re.fullmatch(r"[0-9a-f]{64}", metadata[name]):
            _fail(f"{name} is {metadata[name]!r:.80}, expected 64 lower-case hex digits")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _fail("the entry of 'embeds' is malformed, expected dtype, shape and data_offsets")
    code, shape = entry["dtype"], entry["shape"]
    if not isinstance(code, str) or code not in _DTYPES or metadata["dtype"] != code:
        _fail(f"dtype is {code!r:.80} and {metadata['dtype']!r:.80}, expected F32, BF16 or F16, twice")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        _fail(f"shape is {shape!r:.80}, expected two ints")
    fields = _parse_fields(metadata)
    _check_fields(fields)
    _check_shape(tuple(shape), fields["num_context_tokens"], fields["ratio"])
    rows, width = shape
    size = rows * width * _DTYPES[code].itemsize
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or [type(end) for end in offsets] != [int, int] or offsets != [0, size]:
        _fail(f"data_offsets is {offsets!r:.80}, expected [0, {size}] for shape {shape} of {code}")
    return metadata, code, (rows, width), size, _text_size(content["text"], size) if "text" in content else 0


def _text_size(entry: object, start: int) -> int:
    """The bytes of text that its entry in a header announces, behind ``start`` bytes of embeddings."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"} or entry["dtype"] != "U8":
        _fail("the entry of 'text' is malformed, expected dtype U8, shape and data_offsets")
    shape = entry["shape"]
    if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or shape[0] < 1:
        _fail(f"the shape of 'text' is {shape!r:.80}, expected one int of at least 1")
    size: int = shape[0]
    if size > MAX_TEXT_BYTES:
        _fail(f"text has {size:,} bytes, expected at most {MAX_TEXT_BYTES:,}")
    offsets = entry["data_offsets"]
    if (
        not isinstance(offsets, list)
        or [type(end) for end in offsets] != [int, int]
        or offsets != [start, start + size]
    ):
        _fail(f"data_offsets of 'text' is {offsets!r:.80}, expected [{start}, {start + size}]")
    return size


def _parse_fields(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `SoftTokens` in metadata: decimal digits become numbers, the rest stays text."""
    fields: dict[str, Any] = {name: metadata.get(name, "") for name in _FIELDS}
    for name in ("num_context_tokens", "ratio"):
        if re.fullmatch(r"[1-9][0-9]{0,11}", fields[name]):
            fields[name] = int(fields[name])
    text = fields["ratio"]
    if isinstance(text, str) and re.fullmatch(r"[1-9][0-9]{0,8}\.[0-9]{1,17}", text) and repr(float(text)) == text:
        fields["ratio"] = float(text)  # one spelling for each value, as `to_bytes` writes it
    return fields


def _metadata_digest(metadata: Mapping[str, str], shape: tuple[int, ...]) -> str:
    covered = {key: value for key, value in metadata.items() if key != "metadata_sha256"}
    return hashlib.sha256(canonical_json({**covered, "shape": list(shape)})).hexdigest()
