"""Text from bytes: UTF-8, and one clear line for everything else."""

from __future__ import annotations

import codecs


def decode_text(data: bytes, name: str) -> str:
    """``data`` as UTF-8 text without a byte order mark.

    Args:
        data: the bytes of a whole source.
        name: what errors call the source.

    Raises:
        ValueError: there are no characters, the bytes are not UTF-8, or they hold NUL characters. UTF-8 allows these,
            but a file that has them is UTF-16 or UTF-32 without a byte order mark, or no text at all.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise ValueError(f"{name}: UTF-16 or UTF-32 by its first bytes; expected text in UTF-8")
    if (place := data.find(b"\0")) >= 0:
        raise ValueError(
            f"{name}: a NUL at byte offset {place}, as in UTF-16, UTF-32 and binary files; expected text in UTF-8"
        )
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        place, reason = error.start, error.reason
        raise ValueError(
            f"{name}: not UTF-8 text: {reason} at byte offset {place} (0x{data[place]:02x}); expected text in UTF-8"
        ) from None
    if not text:
        raise ValueError(f"{name}: empty; expected a text of at least one token")
    return text
