"""A line to Redis for the small questions that a request waits for, beside the client that does everything else.

The client takes a connection from its pool and sets timers for every command, which doubles what a question costs.
Here the questions of everybody who has asked since the last ones were sent go together.
"""

import asyncio
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any, Final

from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import ResponseError

_PATIENCE_SECONDS: Final = 0.05

Command = tuple[str | bytes | int, ...]


class Line:
    """One connection, made when it is first needed and again after it has failed; replies come in order."""

    def __init__(self, url: str) -> None:
        pool = ConnectionPool.from_url(url, socket_timeout=None, retry=Retry(NoBackoff(), 0))
        self._connection: AbstractConnection = pool.make_connection()  # type: ignore[no-untyped-call]
        self._asked: dict[tuple[Command, ...], list[asyncio.Future[Sequence[Any]]]] = {}
        self._speaking: asyncio.Task[None] | None = None

    async def ask(self, *commands: Command) -> Sequence[Any]:
        """The replies to commands that are sent at some instant after this call; equal ones are sent once.

        Raises one of REDIS_ERRORS if they do not come soon.
        """
        replies: asyncio.Future[Sequence[Any]] = asyncio.get_running_loop().create_future()
        self._asked.setdefault(commands, []).append(replies)
        if self._speaking is None:
            self._speaking = asyncio.create_task(self._speak())
        return await replies

    async def close(self) -> None:
        """Wait for what has been asked, then hang up."""
        if self._speaking:
            await self._speaking
        await self._connection.disconnect()

    async def _speak(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, {}
            try:
                async with asyncio.timeout(_PATIENCE_SECONDS):
                    replies = iter(await self._replies(list(chain.from_iterable(asked))))
            except Exception as error:  # noqa: BLE001 - whatever goes wrong, those who wait hear of it
                for waiting in chain.from_iterable(asked.values()):
                    if not waiting.done():
                        waiting.set_exception(error)
                continue
            for commands, everybody in asked.items():
                found = list(islice(replies, len(commands)))
                refusal = next((reply for reply in found if isinstance(reply, ResponseError)), None)
                for waiting in everybody:
                    if waiting.done():
                        continue
                    if refusal:
                        waiting.set_exception(refusal)
                    else:
                        waiting.set_result(found)
        self._speaking = None

    async def _replies(self, commands: Sequence[Command]) -> list[Any]:
        try:
            return await self._exchange(commands)
        except Disconnected:  # since the last questions, perhaps
            return await self._exchange(commands)

    async def _exchange(self, commands: Sequence[Command]) -> list[Any]:
        connection = self._connection
        try:
            await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
            return [await self._reply() for _ in commands]
        except BaseException as error:
            await connection.disconnect(nowait=True)  # what still comes must not be taken for later replies
            if isinstance(error, RuntimeError):  # the event loop's, for a closed transport
                raise Disconnected("the connection is closed") from error
            raise

    async def _reply(self) -> Any:
        """One reply; a refusal is one too, and concerns nobody else."""
        try:
            return await self._connection.read_response()
        except ResponseError as error:
            return error
