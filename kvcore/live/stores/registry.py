"""From a URL to a store: `--l2 files:/var/cache/kvcore`, `redis://host:6379/0`, `s3://bucket/prefix?endpoint=...`."""

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from kvcore.live.stores.base import Store, StoreError

Factory: TypeAlias = Callable[[str, int | None], Store]
"""Makes a store from a URL and the most bytes that it may hold (None: no limit of ours)."""

ENTRY_POINTS = "kvcore.stores"


def open_store(url: str, size_bytes: int | None = None) -> Store:
    """Open the store that a URL names.

    | URL | store | options after `?` |
    | --- | --- | --- |
    | `files:/folder` | a folder with a file a chunk | |
    | `redis://`, `rediss://`, `valkey://`, `valkeys://` host:port/db | Redis or Valkey | `prefix`, `timeout` |
    | `s3://bucket/prefix` | S3 and its like | `endpoint`, `region`, `timeout`, `retries` |
    | any other scheme | a vendor's, by entry point in the group `kvcore.stores` | theirs |

    A prefix is for one server, as a folder is: what one evicts is deleted for all (`ARCHITECTURE.md`).

    `size_bytes` is kept by the folder; Redis and S3 have their own limits, and the core never stores more.

    Raises:
        StoreError: the URL cannot be read, no store has its scheme, a package is missing, or the store refuses.
    """
    scheme = url.partition(":")[0]
    factory = _BUILT_IN.get(scheme) or _vendors(scheme)
    try:
        return factory(url, size_bytes)
    except ModuleNotFoundError as error:
        raise StoreError(f"{scheme}: needs the Python package {error.name}, which is not installed") from error


def _files(url: str, size_bytes: int | None) -> Store:
    from kvcore.live.stores.files import FileStore  # noqa: PLC0415 - a store's packages are loaded when it is used

    parts = urlsplit(url)
    if parts.netloc or not parts.path.startswith("/") or parts.query:
        raise StoreError(f"{url}: files:/absolute/folder is expected")
    return FileStore(Path(unquote(parts.path)), size_bytes)


def _redis(url: str, size_bytes: int | None) -> Store:
    from kvcore.live.stores.redis import RedisStore  # noqa: PLC0415

    parts = urlsplit(url)
    ours = _options(parts, {"prefix": str, "timeout": float}, others_allowed=True)
    theirs = [(key, value) for key, value in parse_qsl(parts.query) if key not in ours]
    scheme = parts.scheme.replace("valkey", "redis")
    return RedisStore(parts._replace(scheme=scheme, query=urlencode(theirs)).geturl(), **ours)  # type: ignore[arg-type]


def _s3(url: str, size_bytes: int | None) -> Store:
    from kvcore.live.stores.s3 import S3Store  # noqa: PLC0415

    parts = urlsplit(url)
    if not parts.netloc or "@" in parts.netloc:
        raise StoreError("s3://bucket/prefix is expected, with credentials in the environment, not in the URL")
    options = _options(parts, {"endpoint": str, "region": str, "timeout": float, "retries": int})
    return S3Store(parts.netloc, prefix=parts.path.strip("/"), **options)  # type: ignore[arg-type]


def _options(
    parts: SplitResult, known: Mapping[str, Callable[[str], object]], *, others_allowed: bool = False
) -> dict[str, object]:
    options: dict[str, object] = {}
    for key, value in parse_qsl(parts.query):
        if key in known:
            try:
                options[key] = known[key](value)
            except ValueError as error:
                raise StoreError(f"{parts.scheme}: {key}={value} is not a number") from error
        elif not others_allowed:
            raise StoreError(f"{parts.scheme}: no option {key!r}, only {', '.join(known)}")
    return options


def _vendors(scheme: str) -> Factory:
    found = tuple(entry_points(group=ENTRY_POINTS, name=scheme))
    if not found:
        vendors = {point.name for point in entry_points(group=ENTRY_POINTS)}
        raise StoreError(f"{scheme!r}: no such store; there are {', '.join(sorted({*_BUILT_IN, *vendors}))}")
    if len(found) > 1:
        raise StoreError(f"{scheme!r}: several packages bring this store: {', '.join(p.value for p in found)}")
    factory: Factory = found[0].load()
    return factory


_BUILT_IN: Final[Mapping[str, Factory]] = MappingProxyType(
    {"files": _files, "redis": _redis, "rediss": _redis, "valkey": _redis, "valkeys": _redis, "s3": _s3}
)
