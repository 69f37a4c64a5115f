"""Chunks as objects in a bucket of S3, or of anything that speaks its protocol."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import S3Store as Bucket

from kvcore.live.stores.base import Parts, StoreError, accept, framed


class S3Store:
    """Chunks as objects `<prefix>/<name in hex>`.

    Region and credentials come from where AWS's tools take them (`AWS_*` in the environment, an instance's role); an
    `endpoint` names another provider, over plain HTTP if it says so. Failed requests are tried again, `retries` times
    and for 3 * `timeout` seconds at most. One request a chunk, so that no upload can be left half done in the bucket.

    Raises:
        StoreError: the configuration cannot be read. The bucket is not asked before the first call.
    """

    def __init__(
        self,
        bucket: str,
        *,
        prefix: str = "",
        endpoint: str | None = None,
        region: str | None = None,
        timeout: float = 10.0,
        retries: int = 3,
    ) -> None:
        self.corrupt = 0
        self._where = f"s3://{bucket}/{prefix}"
        config: dict[str, Any] = {"virtual_hosted_style_request": False} if endpoint else {}
        config |= {key: value for key, value in (("endpoint", endpoint), ("region", region)) if value is not None}
        try:
            self._bucket = Bucket(
                bucket,
                prefix=prefix or None,
                config=config,
                client_options={
                    "timeout": timedelta(seconds=timeout),
                    "connect_timeout": timedelta(seconds=min(timeout, 2.0)),
                    "allow_http": endpoint is not None and endpoint.startswith("http://"),
                },
                retry_config={
                    "max_retries": retries,
                    "retry_timeout": timedelta(seconds=3 * timeout),
                    "backoff": {
                        "init_backoff": timedelta(milliseconds=50),
                        "max_backoff": timedelta(seconds=1),
                        "base": 2,
                    },
                },
            )
        except BaseError as error:
            raise self._error(error) from error

    def put(self, chunk: bytes, parts: Parts) -> None:
        """Put an object. See `Store.put`."""
        value = framed(chunk, parts)
        try:
            obstore.put(self._bucket, chunk.hex(), value, use_multipart=False)
        except (BaseError, OSError) as error:
            raise self._error(error) from error

    def get(self, chunk: bytes, into: Parts) -> bool:
        """Get an object. See `Store.get`."""
        try:
            value = obstore.get(self._bucket, chunk.hex()).bytes()
        except (NotFoundError, FileNotFoundError):
            return False
        except (BaseError, OSError) as error:
            raise self._error(error) from error
        is_good = accept(chunk, memoryview(value), into)
        self.corrupt += not is_good
        return is_good

    def delete(self, chunks: Sequence[bytes]) -> None:
        """Delete objects, up to 1000 in a request. See `Store.delete`."""
        try:
            obstore.delete(self._bucket, [chunk.hex() for chunk in chunks])
        except (NotFoundError, FileNotFoundError):
            pass
        except (BaseError, OSError) as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Connections close with the last reference."""
        del self._bucket

    def _error(self, error: Exception) -> StoreError:
        text = " ".join(str(error).split())
        return StoreError(f"{self._where}: {text[:200] or type(error).__name__}")
