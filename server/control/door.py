"""Who may call what, and how a call ends that went wrong. Every method of the service goes through here.

A call is let in before a byte of its request is read. What a person must read leaves as a gRPC status with one
line; any other fault leaves as a fixed sentence, and its text stays in the log.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from server.control.tokens import Role, Token, TokenError, Tokens
from shared.errors import ConfigError, DatabaseError, DataError, MoonflowerError, NotFoundError

log = logging.getLogger("moonflower.control")

SERVICE = "moonflower.v1.Coordinator"
VIEWERS = {  # what a viewer may call; everything else, whatever is added, takes an admin
    *(f"/{SERVICE}/{name}" for name in ("ListRuns", "GetRun", "WatchRun", "ListSites")),
    "/grpc.health.v1.Health/Check",
}
UNENDING = "/grpc.health.v1.Health/Watch"  # for an admin, and left as it is
VIEWING = 48  # calls of viewers at once: below what the server takes, so that an admin always comes in
DEADLINE = 60.0  # seconds for a call with one answer
CODES: dict[type[MoonflowerError], grpc.StatusCode] = {
    ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    DataError: grpc.StatusCode.INVALID_ARGUMENT,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
}
CALLER: ContextVar[str] = ContextVar("caller")  # the name of the token that the call came with

Call = Callable[[Any, grpc.aio.ServicerContext], Any]


class Away(MoonflowerError):
    """What a call needs is away; the same call may work later."""


class Door(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Lets callers in by their token; None lets everybody in, which is for --insecure alone."""

    def __init__(self, tokens: Tokens | None) -> None:
        self._tokens = tokens
        self._viewing = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Give the method's handler with its errors told, or one that refuses the caller."""
        role: Role = "viewer" if details.method in VIEWERS else "admin"
        try:
            token = self._authenticate(details)
        except TokenError as error:
            log.warning("%s refused: %s", details.method, error)
            return _refusal(grpc.StatusCode.UNAUTHENTICATED, str(error))
        except Away as error:
            return _refusal(grpc.StatusCode.UNAVAILABLE, str(error))
        if token is not None and not token.allows(role):
            text = f"the token of {token.name!r} is a {token.role}'s; this takes an {role}'s."
            log.warning("%s refused: %s", details.method, text)
            return _refusal(grpc.StatusCode.PERMISSION_DENIED, text)
        CALLER.set("insecure" if token is None else token.name)  # the handler runs in this same task
        handler = await continuation(details)
        if handler is None or details.method == UNENDING:
            return handler
        return _told(handler, details.method, partial(self._place, token))

    @contextmanager
    def _place(self, token: Token | None) -> Iterator[None]:
        """Hold a place for a call while it lasts; viewers have only so many."""
        viewer = token is not None and token.role == "viewer"
        if viewer and self._viewing >= VIEWING:
            raise Away(f"viewers have {VIEWING} calls under way, which is all that they may; try again in a while.")
        self._viewing += viewer
        try:
            yield
        finally:
            self._viewing -= viewer

    def _authenticate(self, details: grpc.HandlerCallDetails) -> Token | None:
        if self._tokens is None:
            return None
        given = str(dict(details.invocation_metadata or ()).get("authorization", ""))
        scheme, _, secret = given.partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise TokenError("a token is needed: metadata `authorization: Bearer TOKEN`.")
        try:
            return self._tokens.authenticate(secret.strip(), datetime.now(UTC))
        except ConfigError as error:
            log.error("nobody is let in: %s", error)
            raise Away("the server cannot read its tokens; its log says why.") from None


def _refusal(code: grpc.StatusCode, text: str) -> grpc.RpcMethodHandler:
    async def refuse(_requests: object, context: grpc.aio.ServicerContext) -> None:
        await context.abort(code, text)

    return grpc.stream_stream_rpc_method_handler(refuse)  # whatever the method is: this kind reads no request first


def _told(
    handler: grpc.RpcMethodHandler, method: str, place: Callable[[], AbstractContextManager[None]]
) -> grpc.RpcMethodHandler:
    """Wrap a handler so that requests are read and parsed, deadlines kept, and errors told in here."""

    async def parse(requests: AsyncIterator[bytes]) -> Any:
        async with asyncio.timeout(DEADLINE):  # a request that never ends holds no place for ever
            data = await anext(requests, None)
        try:
            if data is not None:
                return handler.request_deserializer(data)
        except DecodeError:
            pass
        raise ConfigError(f"the request is not one of {method}.")

    if handler.unary_unary is not None:
        answer: Call = handler.unary_unary

        async def once(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> Any:
            try:
                with place():
                    request = await parse(requests)
                    async with asyncio.timeout(DEADLINE):
                        return await answer(request, context)
            except Exception as error:
                await _fail(error, context, method)

        return grpc.stream_unary_rpc_method_handler(once, None, handler.response_serializer)
    stream: Call = handler.unary_stream

    async def many(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            with place():
                async with aclosing(stream(await parse(requests), context)) as messages:
                    async for message in messages:
                        yield message
        except Exception as error:
            await _fail(error, context, method)

    return grpc.stream_stream_rpc_method_handler(many, None, handler.response_serializer)


async def _fail(error: Exception, context: grpc.aio.ServicerContext, method: str) -> NoReturn:
    """End the call with the status that an error has."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    code = next((code for kind, code in CODES.items() if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
    text = str(error)
    if isinstance(error, Away):
        code = grpc.StatusCode.UNAVAILABLE
    elif isinstance(error, DatabaseError):
        log.error("%s: %s", method, error)
        code, text = grpc.StatusCode.UNAVAILABLE, "the coordinator's database is away; try again in a while."
    elif isinstance(error, TimeoutError):
        code, text = grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer within {DEADLINE:g} s; try again in a while."
    elif code is grpc.StatusCode.INTERNAL:
        log.error("%s failed", method, exc_info=error)
        text = "the coordinator failed to answer; its log says why."
    await context.abort(code, text)
    raise AssertionError("unreachable")  # abort raises
