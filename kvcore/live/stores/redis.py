"""Chunks in a Redis or Valkey server, one string value each."""

from collections.abc import Sequence
from typing import Any, cast

import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from kvcore.live.stores.base import Parts, StoreError, StoreFull, accept, framed

_MAX_DELETED_AT_ONCE = 1000


class RedisStore:
    """Chunks under `<prefix><name>` in the server at a redis-py URL (`redis://`, `rediss://`, `unix://`).

    The server's own `maxmemory` bounds it; what the server evicts is a miss. A call that the server does not answer in
    `timeout` seconds, after one more try, is a StoreError.

    Raises:
        StoreError: the URL cannot be read. The server is not asked before the first call.
    """

    def __init__(self, url: str, *, prefix: str = "kvcore:", timeout: float = 2.0) -> None:
        self.corrupt = 0
        self._prefix = prefix.encode()
        try:
            self._client = redis.Redis.from_url(
                url,
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                retry=Retry(ConstantBackoff(0.05), 1),
                health_check_interval=30,
                decode_responses=False,
            )
        except ValueError as error:
            raise StoreError(f"redis: {error}") from error
        address = self._client.connection_pool.connection_kwargs
        self._where = f"redis://{address.get('host', address.get('path', 'localhost'))}:{address.get('port', '')}"

    def put(self, chunk: bytes, parts: Parts) -> None:
        """Set a value. See `Store.put`."""
        value = framed(chunk, parts)
        try:
            self._client.set(self._prefix + chunk, value)
        except redis.RedisError as error:
            raise self._error(error) from error

    def get(self, chunk: bytes, into: Parts) -> bool:
        """Get a value. See `Store.get`."""
        try:
            value = cast("bytes | None", self._client.get(self._prefix + chunk))
        except redis.RedisError as error:
            raise self._error(error) from error
        if value is None:
            return False
        is_good = accept(chunk, memoryview(value), into)
        self.corrupt += not is_good
        return is_good

    def delete(self, chunks: Sequence[bytes]) -> None:
        """Unlink keys, all in one round trip. See `Store.delete`."""
        keys = [self._prefix + chunk for chunk in chunks]
        try:
            with self._client.pipeline(transaction=False) as pipeline:
                for at in range(0, len(keys), _MAX_DELETED_AT_ONCE):
                    pipeline.unlink(*keys[at : at + _MAX_DELETED_AT_ONCE])
                pipeline.execute()
        except redis.RedisError as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _error(self, error: Any) -> StoreError:
        if isinstance(error, redis.exceptions.OutOfMemoryError):
            return StoreFull(f"{self._where}: {error}")
        return StoreError(f"{self._where}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
