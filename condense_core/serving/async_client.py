"""``AsyncCondenseClient``: asks ``condense serve`` from an event loop.

``client_calls`` and ``client_answers`` have all that needs no network.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

from condense_core._version import __version__
from condense_core.files.atomic import naming
from condense_core.serving.client_answers import (
    MAX_ERROR_BYTES,
    MAX_JSON_BYTES,
    Batch,
    FrameParser,
    json_object,
    pruned_cache,
    soft_tokens,
)
from condense_core.serving.client_calls import (
    DEFAULT_MAX_BYTES,
    DEFAULT_MAX_CACHE_BYTES,
    AnswerFields,
    Backoff,
    Call,
    CompressFields,
    Deadline,
    PruneFields,
    Settings,
    check_max_bytes,
    check_timeout,
    checked_fields,
    checked_text,
    long_messages,
    media_type,
)
from condense_core.serving.errors import BadAnswer, ServingError, Unavailable
from condense_core.serving.wire import FRAMES, JSON, OCTETS

try:
    import httpx
except ModuleNotFoundError as missing:
    raise ImportError("the clients need the package httpx, expected pip install 'condense-core[serve]'") from missing

if TYPE_CHECKING:
    from condense_core.compressor.soft_tokens import SoftTokens
    from condense_core.pruning.cache import PrunedCache

_WRITTEN_AT_ONCE = 2**20


class AsyncCondenseClient:
    """Asks a server, from one event loop.

    >>> async with AsyncCondenseClient("http://localhost:8000") as client:
    ...     soft = await client.compress(text, ratio=4)

    The methods take the fields of ``serving.requests`` by name, and ``timeout``, the seconds of this one call. They end
    by then, whatever the server does, and raise ``serving.errors.ServingError``: those of the server, ``Unavailable``
    where it cannot be reached, ``DeadlineExceeded`` where it does not answer in time, and ``BadAnswer`` where what came
    is no answer. A connection that fails and the statuses 429, 502 and 503 are tried again while there is time.
    Proxies that the environment names are not used, and redirects are not followed.

    Args:
        base_url, api_key, timeout, retries, max_bytes, ca_file: see ``client_calls.Settings``.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
        ca_file: str | Path | None = None,
    ) -> None:
        self._settings = Settings(base_url, api_key, timeout, retries, max_bytes, ca_file)
        try:
            httpx.URL(self._settings.base_url)
        except httpx.InvalidURL as error:
            raise ValueError(f"base_url: got {base_url!r:.100}, expected http://HOST:PORT ({error})") from None
        self._http = httpx.AsyncClient(
            headers=self._settings.headers() | {"user-agent": f"condense_core/{__version__}"},
            verify=self._settings.tls() or False,  # False: the server has no certificate
            timeout=None,  # calls have deadlines
            trust_env=False,
            follow_redirects=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._settings.base_url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def base_url(self) -> str:
        """Whom it asks."""
        return self._settings.base_url

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    # -- compression ---------------------------------------------------------------------------------------------------

    async def compress(self, text: str, **fields: Unpack[CompressFields]) -> SoftTokens:
        """Soft tokens of a text."""
        seconds, body = checked_fields(fields, CompressFields, self._settings.timeout)
        call = self._call("/v1/compress", seconds, {"text": checked_text(text)} | body, accepts=OCTETS)
        return await asyncio.to_thread(soft_tokens, await self._body(call), text, self._settings.max_bytes)

    async def compress_stream(
        self, texts: Iterable[str], **fields: Unpack[CompressFields]
    ) -> AsyncGenerator[tuple[int, SoftTokens | ServingError], None]:
        """Index and soft tokens, or error, of each text, as they are done. What ends all of them is raised.

        Texts that a busy server refuses are asked for again. The time that is spent between results counts too.
        """
        seconds, body = checked_fields(fields, CompressFields, self._settings.timeout)
        deadline, retries = Deadline(seconds), self._settings.retries
        batch = Batch(texts, Backoff(deadline, retries))
        while group := batch.next_group():
            await asyncio.sleep(batch.pause)
            asked = {"texts": [batch.texts[index] for index in group]} | body
            call = Call(self._settings, "/v1/compress", accepts=FRAMES, deadline=deadline, body=asked)
            async with aclosing(self._frames(call, len(group))) as frames:
                async for place, got in frames:
                    index = group[place]
                    made = got if isinstance(got, ServingError) else await self._read_soft(got, batch.texts[index])
                    if not batch.asks_again(index, made):
                        yield index, made

    @overload
    async def compress_many(
        self, texts: Iterable[str], *, return_errors: Literal[False] = False, **fields: Unpack[CompressFields]
    ) -> list[SoftTokens]: ...

    @overload
    async def compress_many(
        self, texts: Iterable[str], *, return_errors: bool, **fields: Unpack[CompressFields]
    ) -> list[SoftTokens | ServingError]: ...

    async def compress_many(
        self, texts: Iterable[str], *, return_errors: bool = False, **fields: Unpack[CompressFields]
    ) -> Any:
        """Soft tokens of each text, in order.

        Args:
            texts: any number; several requests are made of more than a server takes at once.
            return_errors: the error of a text stands in its place; otherwise the first that comes is raised, with the
                index of its text.
        """
        return await self._gathered(texts, [], return_errors, fields)

    async def compress_messages(
        self, messages: Iterable[Mapping[str, Any]], min_chars: int = 1000, **fields: Unpack[CompressFields]
    ) -> list[dict[str, Any]]:
        """Messages of a chat, with soft tokens as the ``content`` of those of at least ``min_chars`` characters.

        Order and all else stay; what is short, or no text, is not sent to the server.
        """
        chat, long = long_messages(messages, min_chars)
        made = await self._gathered([chat[i]["content"] for i in long], [f"messages[{i}]" for i in long], False, fields)
        for index, soft in zip(long, made, strict=True):
            chat[index]["content"] = soft
        return chat

    async def _gathered(
        self, texts: Iterable[str], names: list[str], return_errors: bool, fields: CompressFields
    ) -> list[SoftTokens | ServingError]:
        found: dict[int, SoftTokens | ServingError] = {}
        async with aclosing(self.compress_stream(texts, **fields)) as stream:
            async for index, made in stream:
                if isinstance(made, ServingError) and not return_errors:
                    made.args = (f"{names[index] if names else f'texts[{index}]'}: {made}",)
                    raise made
                found[index] = made
        return [found[index] for index in range(len(found))]

    # -- caches and answers --------------------------------------------------------------------------------------------

    async def prune(
        self,
        text: str,
        *,
        max_bytes: int = DEFAULT_MAX_CACHE_BYTES,
        folder: str | Path | None = None,
        **fields: Unpack[PruneFields],
    ) -> PrunedCache:
        """A pruned cache of a text, mapped from a file that has no name any more.

        Args:
            text: of at least one token.
            max_bytes: of the file.
            folder: which has room for it; None: that of the system's temporary files.

        Raises:
            OSError: there is no room.
        """
        check_max_bytes(max_bytes)
        seconds, body = checked_fields(fields, PruneFields, self._settings.timeout)
        asked = {"text": checked_text(text)} | body
        call = self._call("/v1/prune", seconds, asked, accepts=OCTETS, max_bytes=max_bytes)
        handle, name = tempfile.mkstemp(".safetensors", "condense-", folder)
        path = Path(name)
        try:
            with naming("write a pruned cache to", path), os.fdopen(handle, "wb") as file:
                waiting = bytearray()
                async with aclosing(self._chunks(call)) as chunks:
                    async for chunk in chunks:
                        waiting += chunk
                        if len(waiting) >= _WRITTEN_AT_ONCE:
                            await asyncio.to_thread(file.write, bytes(waiting))
                            waiting.clear()
                file.write(waiting)
            return await asyncio.to_thread(pruned_cache, path)
        finally:
            path.unlink(missing_ok=True)

    async def answer(self, text: str, question: str, **fields: Unpack[AnswerFields]) -> dict[str, Any]:
        """What the server's model answers to a question about a text: ``{"answer": ...}`` and figures."""
        seconds, body = checked_fields(fields, AnswerFields, self._settings.timeout)
        asked = {"text": checked_text(text), "question": checked_text(question, "question")} | body
        return json_object(await self._body(self._call("/v1/answer", seconds, asked, max_bytes=MAX_JSON_BYTES)))

    # -- the server ----------------------------------------------------------------------------------------------------

    async def models(self, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """What the server offers."""
        told = (await self._get("/v1/models", timeout)).get("data")
        if not isinstance(told, list) or not all(isinstance(each, dict) for each in told):
            raise BadAnswer("models: got no list of objects as data")
        return told

    async def load(self, *, timeout: float | None = None) -> dict[str, Any]:
        """How much the server has to do."""
        return await self._get("/v1/load", timeout)

    async def is_ready(self, *, timeout: float | None = None) -> bool:
        """Whether the server accepts requests, asked once; False where it cannot be reached."""
        try:
            await self._get("/ready", timeout, retries=0)
        except ServingError as error:
            if isinstance(error, Unavailable):
                return False
            raise
        return True

    # -- the network ---------------------------------------------------------------------------------------------------

    def _call(self, path: str, seconds: float, body: Mapping[str, Any], **bounds: Any) -> Call:
        bounds.setdefault("accepts", JSON)
        return Call(self._settings, path, deadline=Deadline(seconds), body=body, **bounds)

    async def _get(self, path: str, timeout: float | None, retries: int | None = None) -> dict[str, Any]:
        if timeout is not None:
            check_timeout(timeout)
        deadline = Deadline(self._settings.timeout if timeout is None else timeout)
        call = Call(self._settings, path, accepts=JSON, deadline=deadline, max_bytes=MAX_JSON_BYTES, retries=retries)
        return json_object(await self._body(call))

    async def _body(self, call: Call) -> bytes:
        async with aclosing(self._chunks(call)) as chunks:
            return b"".join([chunk async for chunk in chunks])

    async def _read_soft(self, payload: bytes, text: str) -> SoftTokens | ServingError:
        try:
            return await asyncio.to_thread(soft_tokens, payload, text, self._settings.max_bytes)
        except BadAnswer as error:
            return error

    async def _frames(self, call: Call, count: int) -> AsyncGenerator[tuple[int, bytes | ServingError], None]:
        parser = FrameParser(count, call.max_bytes)
        async with aclosing(self._chunks(call)) as chunks:
            async for chunk in chunks:
                for found in parser.feed(chunk):
                    yield found
        parser.end()

    async def _chunks(self, call: Call) -> AsyncGenerator[bytes, None]:
        """The body of the answer to ``call``, as it comes."""
        while True:
            try:
                response = await self._answered(call)
                break
            except ServingError as error:
                delay = call.backoff.delay(error)
                if delay is None:
                    raise
            call.backoff.tried += 1
            await asyncio.sleep(delay)
        async with aclosing(self._pieces(call, response, call.max_bytes)) as pieces:
            async for piece in pieces:
                yield piece

    async def _answered(self, call: Call) -> httpx.Response:
        """An answer with the status 200, whose body is still to come."""

        async def trace(event: str, _: object) -> None:
            call.reached = call.reached or event.startswith("http11.")

        request = self._http.build_request(
            call.method, call.url, content=call.content(), headers=call.headers(), extensions={"trace": trace}
        )
        try:
            async with asyncio.timeout(call.deadline.left()):
                response = await self._http.send(request, stream=True)
        except TimeoutError:
            raise call.late() from None
        except httpx.TransportError as error:
            garbage = isinstance(error, httpx.RemoteProtocolError) and "disconnected" not in str(error)
            raise (call.no_http() if garbage else call.broken(error)) from None
        try:
            call.check_head(response.status_code, response.headers)
            if response.status_code == 200:
                return response
            body = b""
            if media_type(response.headers) == JSON:
                async with aclosing(self._pieces(call, response, MAX_ERROR_BYTES)) as pieces:
                    body = b"".join([piece async for piece in pieces])
            raise call.failure(response.status_code, response.headers, body)
        except BaseException:
            await response.aclose()
            raise

    async def _pieces(self, call: Call, response: httpx.Response, most: int) -> AsyncGenerator[bytes, None]:
        """The body of ``response``, at most so many bytes of it."""
        raw, size = response.aiter_raw(), 0
        try:
            while True:
                async with asyncio.timeout(call.deadline.left()):
                    piece = await anext(raw, None)
                if piece is None:
                    return
                size += len(piece)
                if size > most:
                    raise call.too_large(most)
                yield piece
        except TimeoutError:
            raise call.late() from None
        except httpx.TransportError:
            raise call.cut_off() from None
        finally:
            await response.aclose()
