"""The server's settings: one table of names, types, defaults and help, read from flags, environment and a TOML file.

A setting `l1_size_gb` is the flag `--l1-size-gb`, the variable `KVCORE_L1_SIZE_GB` and the TOML key `l1-size-gb`, in
that order of precedence. GB count 2**30 bytes.
"""

import mmap
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from kvcore.live.wire import DEFAULT_ARENA_DIR, DEFAULT_PORT, ipc_endpoint
from kvcore.policy import POLICIES, CoreConfig, LoadCost, TierConfig

GB = 1 << 30
ENVIRONMENT = "KVCORE_"
_BESIDE = ("CONFIG", "SERVER")
"""Variables that are no settings of the server: where its file lies, and what the other commands ask."""
_MOST_GB = 1 << 20
_MOST_S = 1e9
_SIZE = re.compile(r"(\d+)\s*([KMG]?)(?:i?B)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_STAGING_SHARE = 16
"""With write-back, one page in so many is kept back for chunks on their way down."""


class SettingsError(ValueError):
    """A setting that cannot be; the message is one line that names it."""


def _help(text: str, group: str, **bounds: Any) -> Meta:
    return Meta(description=text, extra={"group": group}, **bounds)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a server can be told."""

    l1_size_gb: Annotated[
        float, _help("Size of L1, for all ranks and models together, in 2^30 bytes.", "Cache", gt=0, le=_MOST_GB)
    ] = 4.0
    chunk_size: Annotated[
        int, _help("Tokens in a chunk, a multiple of the engines' block size.", "Cache", gt=0, le=1 << 24)
    ] = 256
    eviction_policy: Annotated[str, _help(f"Who leaves L1: {', '.join(POLICIES)}.", "Cache")] = "lru"
    admission: Annotated[
        Literal["always", "second-use"], _help("Store a chunk at once (always) or when it is missed again.", "Cache")
    ] = "always"
    ttl_s: Annotated[
        float, _help("Drop chunks unused for so many seconds; 0 keeps them.", "Cache", ge=0, le=_MOST_S)
    ] = 0.0
    quota: Annotated[
        tuple[str, ...], _help("SALT=GB: the most of L1 that a tenant may hold. Repeatable.", "Cache")
    ] = ()
    load_cost: Annotated[
        str, _help("JSON file of costs, as kvcore doctor writes: load a hit only where that is faster.", "Cache")
    ] = ""
    l2: Annotated[
        str,
        _help(
            "The store behind L1: files:/path, redis://HOST:PORT/DB?prefix=..., s3://BUCKET/PREFIX?endpoint=... "
            "Folder or prefix are for one server: two delete each other's chunks.",
            "L2",
        ),
    ] = ""
    l2_size_gb: Annotated[float, _help("Size of L2; 0 for no bound.", "L2", ge=0, le=_MOST_GB)] = 0.0
    l2_eviction_policy: Annotated[str, _help("Who leaves L2.", "L2")] = "lru"
    placement: Annotated[
        Literal["write-through", "write-back"], _help("Copy to L2 when stored, or when evicted from L1.", "L2")
    ] = "write-through"
    promote_on_hit: Annotated[bool, _help("Whether chunks loaded from L2 stay in L1.", "L2")] = True
    l2_threads: Annotated[
        int,
        _help("Threads that copy to L2, and that copy from it; 0: half of the processors, 2 to 8.", "L2", ge=0, le=64),
    ] = 0
    l2_queue_gb: Annotated[
        float, _help("Copies to L2 that may wait; beyond, they are dropped.", "L2", gt=0, le=_MOST_GB)
    ] = 1.0
    bind: Annotated[
        tuple[str, ...],
        _help(
            f"ipc://PATH or tcp://HOST:PORT to listen on. Repeatable. Default: {ipc_endpoint('ARENA_DIR')} and "
            f"tcp://127.0.0.1:{DEFAULT_PORT}. Every connection takes a descriptor (ulimit -n), and libzmq ends "
            "a server that has none left.",
            "Network",
        ),
    ] = ()
    http: Annotated[str, _help("HOST:PORT of health, metrics and the operator's API; off for none.", "Network")] = (
        "127.0.0.1:8080"
    )
    curve_key: Annotated[
        str, _help("CURVE certificate (secret) of the server; needed to listen on tcp beyond loopback.", "Network")
    ] = ""
    curve_clients: Annotated[
        str, _help("Folder of the certificates of the clients that may connect; needed with --curve-key.", "Network")
    ] = ""
    name: Annotated[str, _help("Name of the arena; servers on one host differ in it.", "Arena")] = str(DEFAULT_PORT)
    arena_dir: Annotated[str, _help("Folder of the arena, in shared memory.", "Arena")] = DEFAULT_ARENA_DIR
    page_size: Annotated[str, _help("Size of an arena page, 2MiB for example.", "Arena")] = "2MiB"
    pretouch: Annotated[bool, _help("Fault the arena's pages in, in the background.", "Arena")] = True
    huge_pages: Annotated[bool, _help("Use huge pages where the system has them.", "Arena")] = True
    lease_s: Annotated[
        float, _help("A process unheard of for longer is not believed to be copying.", "Arena", ge=0.1, le=3600)
    ] = 10.0
    record: Annotated[
        str,
        _help("Write a trace of every request: FILE.jsonl, .jsonl.gz or .jsonl.zst. Holds tenants' salts.", "Logs"),
    ] = ""
    record_max_mb: Annotated[int, _help("Go on in another trace file after so many MiB.", "Logs", ge=1)] = 256
    journal: Annotated[
        str,
        _help("Folder of the journal, by which L1 survives a crash and L2 any restart. Holds tenants' salts.", "Logs"),
    ] = ""
    journal_segment_mb: Annotated[int, _help("Size of a journal segment.", "Logs", ge=1, le=1 << 16)] = 256
    journal_segments: Annotated[int, _help("Journal segments to keep.", "Logs", ge=1)] = 4
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], _help("What to log, to standard error.", "Logs")
    ] = "info"

    @property
    def page_bytes(self) -> int:
        """The page size in bytes. Raises SettingsError."""
        return parse_size(self.page_size, "page-size")

    @property
    def l1_bytes(self) -> int:
        """Bytes of L1."""
        return int(self.l1_size_gb * GB)

    @property
    def l2_bytes(self) -> int:
        """Bytes of L2, 0 where it has no bound."""
        return int(self.l2_size_gb * GB)

    @property
    def copying_threads(self) -> int:
        """Threads that copy to L2, and as many that copy from it.

        One copies 2 to 4 GB/s out of a file that lies in the page cache. Beside an H100, on 16 processors, the first
        token of a prompt of 32,000 that was in L2 took 0.92 s with 2 threads and 0.38 s with 8.
        """
        return self.l2_threads or min(8, max(2, len(os.sched_getaffinity(0)) // 2))

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where to listen."""
        return self.bind or (ipc_endpoint(self.arena_dir), f"tcp://127.0.0.1:{DEFAULT_PORT}")

    def quotas(self) -> tuple[tuple[str, int], ...]:
        """Return (salt, pages) of every quota. Raises SettingsError."""
        found = []
        for item in self.quota:
            salt, _, size = item.rpartition("=")
            try:
                size_gb = float(size)
            except ValueError:
                size_gb = -1.0
            if not 0 <= size_gb <= _MOST_GB:
                raise SettingsError(f"--quota {item}: not SALT=GB, of 0 to {_MOST_GB} GB")
            found.append((salt, int(size_gb * GB) // self.page_bytes))
        return tuple(found)

    def core_config(self) -> CoreConfig:
        """Return the core's configuration. Raises SettingsError."""
        pages = self.l1_bytes // self.page_bytes
        l1 = TierConfig(name="l1", pages=pages - self.staging_pages, eviction=self.eviction_policy)
        tiers: tuple[TierConfig, ...] = (l1,)
        if self.l2:
            l2_pages = self.l2_bytes // self.page_bytes if self.l2_size_gb else None
            tiers = (l1, TierConfig(name="l2", pages=l2_pages, eviction=self.l2_eviction_policy))
        return CoreConfig(
            tiers=tiers,
            placement=self.placement,
            promote_on_hit=self.promote_on_hit,
            admission=self.admission,
            ttl_ns=round(self.ttl_s * 1e9) or None,
            quotas=self.quotas(),
            load_cost=self._load_cost(),
        )

    @property
    def l2_place(self) -> str:
        """The store's URL without users, passwords and options: what a journal may tell of it."""
        parts = urlsplit(self.l2)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" if self.l2 else ""

    def shown(self) -> dict[str, Any]:
        """Return the settings as plain data, without what only the store is to know."""
        return {**msgspec.to_builtins(self), "l2": self.l2_place}

    @property
    def staging_pages(self) -> int:
        """Pages of the arena that the core does not count with: room for chunks that write-back takes down."""
        if not self.l2 or self.placement != "write-back":
            return 0
        return max(1, self.l1_bytes // self.page_bytes // _STAGING_SHARE)

    def _load_cost(self) -> LoadCost | None:
        if not self.load_cost:
            return None
        try:
            return msgspec.json.decode(Path(self.load_cost).read_bytes(), type=LoadCost)
        except OSError as error:
            raise SettingsError(f"--load-cost {self.load_cost}: {error.strerror}") from None
        except (msgspec.MsgspecError, ValueError) as error:
            raise SettingsError(f"--load-cost {self.load_cost}: {error}") from None


def load(flags: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Settings:
    """Return the settings: defaults, then a TOML file (`config` in flags or environment), then environment, then flags.

    Raises SettingsError for a name that is none, a value out of range, or settings that do not go together.
    """
    environment = os.environ if environment is None else environment
    given: dict[str, Any] = {}
    sources: dict[str, str] = {}
    path = flags.get("config") or environment.get(f"{ENVIRONMENT}CONFIG")
    if path:
        given.update(_read_toml(Path(path)))
        sources.update({name: f"--config {path}, {name}" for name in given})
    for name in Settings.__struct_fields__:
        variable = ENVIRONMENT + name.upper()
        if variable in environment:
            given[name], sources[name] = environment[variable], variable
        if flags.get(name) not in (None, ()):
            given[name] = flags[name]
            sources.pop(name, None)
    try:
        return check(_convert(given))
    except SettingsError as error:
        raise SettingsError(_by_source(str(error), sources)) from None


def strange_variables(environment: Mapping[str, str]) -> list[str]:
    """Return a line about every variable that looks like a setting and is none."""
    known = [ENVIRONMENT + name.upper() for name in (*Settings.__struct_fields__, *_BESIDE)]
    lines = []
    for name in sorted(environment):
        if name.startswith(ENVIRONMENT) and name not in known:
            nearest = get_close_matches(name, known, 1)
            lines.append(f"{name} is no setting" + (f": did you mean {nearest[0]}?" if nearest else ""))
    return lines


def check(settings: Settings) -> Settings:
    """Return the settings if they go together. Raises SettingsError."""
    if settings.page_bytes % mmap.PAGESIZE or not settings.page_bytes:
        raise SettingsError(f"--page-size {settings.page_size}: no multiple of the system's {mmap.PAGESIZE} bytes")
    for name in ("eviction_policy", "l2_eviction_policy"):
        policy = getattr(settings, name)
        if policy not in POLICIES:
            raise SettingsError(f"{flag(name)}: no eviction policy {policy!r}; there are {', '.join(POLICIES)}")
    if not settings.l1_bytes // settings.page_bytes >= 1:
        raise SettingsError(f"--l1-size-gb {settings.l1_size_gb:g}: less than one page of {settings.page_bytes} bytes")
    if settings.l2_size_gb and settings.l2_bytes < settings.page_bytes:
        raise SettingsError(
            f"--l2-size-gb {settings.l2_size_gb:g}: less than one page of {settings.page_bytes} bytes (0 is no bound)"
        )
    try:
        settings.core_config()
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(str(error)) from None
    for endpoint in settings.endpoints:
        _check_endpoint(endpoint, settings)
    http_address(settings)
    return settings


def http_address(settings: Settings) -> tuple[str, int] | None:
    """Return host and port of the HTTP server, None for none. Raises SettingsError."""
    if settings.http in ("", "off"):
        return None
    host, _, port = settings.http.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f"--http {settings.http}: not HOST:PORT")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether a host, without brackets, is this machine alone."""
    try:
        return host.lower() == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def parse_size(text: str, name: str) -> int:
    """Return the bytes of `2MiB`, `64K` or `4096`; units are powers of 1024. Raises SettingsError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise SettingsError(f"--{name} {text}: not a size, such as 2MiB")
    return int(found[1]) * _UNITS[found[2].upper()]


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


@contextmanager
def naming(name: str, value: str) -> Iterator[None]:
    """Have what goes wrong within name the flag by which it can be mended. Raises SettingsError."""
    try:
        yield
    except (OSError, ValueError) as error:
        why = error.strerror or error if isinstance(error, OSError) else error
        raise SettingsError(f"{flag(name)} {value}: {why}") from error


def plain_type(name: str) -> Any:
    """Return a setting's type without its bounds."""
    hint = get_type_hints(Settings, include_extras=True)[name]
    return get_args(hint)[0]


def meta(name: str) -> Meta:
    """Return a setting's help and bounds."""
    found: Meta = get_args(get_type_hints(Settings, include_extras=True)[name])[1]
    return found


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: {error}") from None
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name in found:
            raise SettingsError(f"--config {path}: {name!r} is there twice, with - and with _")
        found[name] = value
    unknown = sorted(set(found) - set(Settings.__struct_fields__))
    if unknown:
        raise SettingsError(f"--config {path}: no setting {unknown[0]!r}")
    return found


def _convert(given: dict[str, Any]) -> Settings:
    for name, value in given.items():
        if isinstance(value, str) and get_origin(plain_type(name)) is tuple:
            given[name] = [part.strip() for part in value.split(",") if part.strip()]
    try:
        return msgspec.convert(given, Settings, strict=False)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$.")
        name = place.split("[")[0].rstrip("`")
        raise SettingsError(f"{flag(name) if name else 'settings'}: {message}") from None


def _by_source(message: str, sources: Mapping[str, str]) -> str:
    """Have an error that begins with a setting's flag begin with where the setting is from."""
    word = message.split(" ", 1)[0].rstrip(":")
    source = next((source for name, source in sources.items() if flag(name) == word), word)
    return source + message.removeprefix(word)


def _check_endpoint(endpoint: str, settings: Settings) -> None:
    scheme, _, rest = endpoint.partition("://")
    if scheme == "ipc" and rest:
        if len(rest.encode()) > 100:
            raise SettingsError(
                f"--bind {endpoint}: the path of a unix socket has at most 100 bytes (by default it is in --arena-dir)"
            )
        return
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not (port.isdigit() and int(port) <= 65535):
        raise SettingsError(f"--bind {endpoint}: not ipc://PATH or tcp://HOST:PORT")
    if not is_loopback(host.strip("[]")) and not (settings.curve_key and settings.curve_clients):
        raise SettingsError(f"--bind {endpoint}: beyond loopback it takes --curve-key and --curve-clients")
