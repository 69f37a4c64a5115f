"""The connectors as vLLM sees them: one object in the scheduler's process, and one in each worker's."""

import logging
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

from kvcore.live.client import Register, RegistrationRefused, SchedulerClient, WorkerClient
from kvcore.policy.hashing import Namespace
from kvcore.vllm import compat, identity
from kvcore.vllm.embedded import EmbeddedServer, embedded_settings
from kvcore.vllm.failed_loads import recompute_by_preemption
from kvcore.vllm.jobs import StepPlan, StepReport
from kvcore.vllm.metrics import KVCorePromMetrics, KVCoreStats
from kvcore.vllm.mover import Cache
from kvcore.vllm.namespace import Hasher
from kvcore.vllm.scheduler import Options, SchedulerSide
from kvcore.vllm.settings import read
from kvcore.vllm.worker import WorkerSide

_LOG = logging.getLogger("kvcore.vllm")
_START_S = 2.0
"""How long the start of vLLM waits for a server that does not answer."""
_EMBEDDED_DEADLINE_S = 10.0


@dataclass
class KVCoreMetadata(compat.KVConnectorMetadata):  # type: ignore[misc]  # vLLM is untyped here
    """A step's plan, from the scheduler to the workers."""

    plan: StepPlan


@dataclass
class KVCoreWorkerMetadata(compat.KVConnectorWorkerMetadata):  # type: ignore[misc]
    """A step's report, from the workers to the scheduler; it is known when the step's loads are over."""

    report: Callable[[], StepReport]

    def aggregate(self, other: "KVCoreWorkerMetadata") -> "KVCoreWorkerMetadata":
        """Merge two ranks' reports."""
        return KVCoreWorkerMetadata(partial(_same, self.report().merge(other.report())))

    def __reduce__(self) -> tuple[Any, ...]:
        """Wait for the report before it is sent to another process."""
        return KVCoreWorkerMetadata, (partial(_same, self.report()),)


def _same(report: StepReport) -> StepReport:
    return report


@dataclass
class KVCoreHandshake(compat.KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """What a worker's KV cache is like, told to the scheduler once."""

    fingerprint: str
    block_bytes: int
    attached: bool
    """Whether the worker has mapped the arena."""


class KVCoreMPConnector(compat.KVConnectorBase_V1):  # type: ignore[misc]
    """Reuses KV through a `kvcore serve` on the same host, which several vLLM instances can share.

    Raises, in the constructor or when the engine starts:
        kvcore.vllm.compat.UnsupportedModelError: The model's KV cannot be reused by prefix, or not with these settings.
        kvkernels.LayoutError: Its cache lies in memory in a way that is not known.
        kvcore.live.client.RegistrationRefused: The server will not have this engine, and why.
        kvcore.live.server.StartError: The server in this process cannot start (`KVCoreConnector`).
        RuntimeError: This version of vLLM lacks what kvcore needs of it.
        ValueError: An unknown key in `kv_connector_extra_config`, or a value that does not fit.
    """

    if (_hits := compat.host_cache_hits()) is not None:
        _cache_hit_source = _hits
    _embedded = False
    """Whether the connector brings its own server."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        compat.log_with_vllm()
        compat.check_version()
        self._spec = compat.attention_spec(kv_cache_config)
        compat.check_supported(vllm_config, self._spec)
        self._settings = read(self._kv_transfer_config.kv_connector_extra_config or {}, embedded=self._embedded)
        self._instance = str(self._kv_transfer_config.engine_id)
        self._shards = 1 if compat.is_mla(self._spec) else vllm_config.parallel_config.world_size
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._cache: Cache | None = None
        self._server = self._start_server() if role == compat.KVConnectorRole.SCHEDULER else None
        self.recomputes_failed_loads = not self._settings.fail_on_load_error
        if role == compat.KVConnectorRole.SCHEDULER:
            recompute_by_preemption()

    def _start_server(self) -> EmbeddedServer | None:
        """Return the server that lives with this connector; none does."""
        return None

    def _endpoint(self) -> str:
        return self._settings.endpoint

    @property
    def _deadline_s(self) -> float:
        return self._settings.deadline_ms / 1000

    def _namespace(self, fingerprint: str) -> Namespace:
        return identity.engine_namespace(
            self._vllm_config,
            layout=fingerprint,
            isa=compat.isa(self._vllm_config, self._spec),
            block_tokens=self._spec.block_size,
        )

    def _register(self, role: Any, *, block_bytes: int, namespace: Namespace, rank: int = 0) -> Register:
        config = self._vllm_config
        return Register(
            instance=self._instance,
            role=role,
            block_tokens=self._spec.block_size,
            block_bytes=block_bytes,
            rank=rank,
            world=config.parallel_config.world_size,
            shards=self._shards,
            engine={} if role == "worker" else compat.engine_facts(config, self._kv_cache_config, self._spec),
            namespace={
                "model": str(config.model_config.model),
                "kv_dtype": namespace.kv_dtype,
                "layout": namespace.layout,
                "isa": namespace.isa,
                "digest": namespace.digest().hex(),
            },
        )

    # The worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Work out how the KV cache lies in memory."""
        config = self._vllm_config
        isa = compat.isa(config, self._spec)
        self._cache = Cache(
            kv_caches,
            num_blocks=self._kv_cache_config.num_blocks,
            block_tokens=self._spec.block_size,
            order="/".join(filter(None, [compat.kv_layout(config), isa])),
            packing=compat.packing(config, self._settings.packing),
        )
        self._worker = WorkerSide(
            self._cache,
            rank=config.parallel_config.rank,
            shards=self._shards,
            factory=compat.transfer_factory(config),
            in_step=compat.copies_in_step(config),
            layerwise=self._settings.layerwise and compat.waits_layer_by_layer(self._kv_cache_config),
        )

    def get_handshake_metadata(self) -> KVCoreHandshake | None:
        """Register with the server, which is there by now if it will be, and say what the KV cache is like."""
        if self._worker is None or self._cache is None:
            return None
        block_bytes = self._cache.block.block_bytes
        fingerprint = self._cache.block.fingerprint()
        register = self._register(
            "worker",
            block_bytes=block_bytes,
            namespace=self._namespace(fingerprint),
            rank=self._vllm_config.parallel_config.rank,
        )
        client = WorkerClient(
            self._endpoint(),
            register,
            drain=self._worker.drain,
            back=self._worker.server_is_back,
            deadline_s=self._deadline_s,
            curve=self._settings.curve,
        )
        self._worker.connect(client)
        client.register(_START_S)
        return KVCoreHandshake(fingerprint, block_bytes, self._worker.warm_up())

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Begin this step's loads: vLLM calls this first, and prepares the step's input before `start_load_kv`.

        Blocks that are free from this step on are guarded like any others that are handed out again.
        """
        if self._worker is not None and isinstance(kv_connector_metadata, KVCoreMetadata):
            self._worker.step_begins(kv_connector_metadata.plan)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin this step's loads."""
        if self._worker is not None and (plan := self._plan()) is not None:
            self._worker.start_loads(plan, one_graph=compat.runs_as_one_graph(forward_context))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Order the loads of a layer before its attention."""
        if self._worker is not None:
            self._worker.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: a step's chunks are stored together, when it has computed them."""

    def wait_for_save(self) -> None:
        """Begin this step's stores; on the CPU backend they end here."""
        if self._worker is not None and (plan := self._plan()) is not None and plan.computes:
            self._worker.finish_step(plan)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return no requests whose blocks were held for stores, and those whose asynchronous loads have ended."""
        if self._worker is None:
            return None, None
        if (plan := self._plan()) is not None and not plan.computes:
            self._worker.finish_step(plan)
        return None, self._worker.received() or None

    def get_block_ids_with_load_errors(self) -> Set[int]:
        """Return blocks that were to be loaded and were not."""
        return set() if self._worker is None else self._worker.bad_blocks()

    def build_connector_worker_meta(self) -> KVCoreWorkerMetadata | None:
        """Return this step's report."""
        report = None if self._worker is None else self._worker.report()
        return None if report is None else KVCoreWorkerMetadata(report)

    def _plan(self) -> StepPlan | None:
        metadata = self._connector_metadata
        return metadata.plan if isinstance(metadata, KVCoreMetadata) else None

    # The scheduler

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """Take in what the workers' KV caches are like, and register with the server."""
        shakes = list(metadata.values())
        if not all(isinstance(shake, KVCoreHandshake) for shake in shakes):
            raise compat.UnsupportedModelError(
                "vLLM's MultiConnector hands on the handshake of its first connector that has one, which was not "
                "kvcore's: list kvcore in front, and no other that has one beside it"
            )
        first: KVCoreHandshake = shakes[0]
        kinds = sorted({(shake.block_bytes, shake.fingerprint) for shake in shakes})
        if len(kinds) > 1:
            told = "; ".join(f"{size} bytes, {fingerprint}" for size, fingerprint in kinds)
            raise compat.UnsupportedModelError(f"kvcore needs equal KV on every rank; a block has {told}")
        namespace = self._namespace(first.fingerprint)
        if not identity.lasts(self._vllm_config):
            _LOG.warning(
                "nothing tells whether the weights of %s have changed: what this engine stores is of no use to others, "
                "nor to itself when it is started anew; --revision names them",
                self._vllm_config.model_config.model,
            )
        client = SchedulerClient(
            self._endpoint(),
            self._register("scheduler", block_bytes=first.block_bytes, namespace=namespace),
            deadline_s=self._deadline_s,
            curve=self._settings.curve,
        )
        registered = client.register(_START_S)
        if registered is not None and registered.chunk_tokens % self._spec.block_size:
            raise RegistrationRefused(
                f"the server's chunk of {registered.chunk_tokens} tokens is no multiple of the block's "
                f"{self._spec.block_size}"
            )
        options = Options(
            block_tokens=self._spec.block_size,
            load_mode=self._settings.load_mode,
            copies_in_step=compat.copies_in_step(self._vllm_config),
            grant_wait_s=self._settings.grant_wait_ms / 1000,
            plans_ahead=compat.plans_ahead(self._vllm_config),
        )
        hasher = Hasher(
            namespace,
            engine_hashes=compat.hashes_by_sha256(self._vllm_config),
            media=compat.names_media(self._vllm_config),
        )
        self._scheduler = SchedulerSide(client, hasher, options)
        if self._server is not None and all(shake.attached for shake in shakes):
            self._server.hide()

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return how many tokens can be loaded behind those computed; None: ask again."""
        return (0, False) if self._scheduler is None else self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Take in the request's blocks, and plan its load."""
        if self._scheduler is not None:
            self._scheduler.allocated(request, compat.block_ids(blocks), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVCoreMetadata:
        """Plan the step; a worker in this process begins its loads right away."""
        if self._scheduler is None:
            return KVCoreMetadata(StepPlan())
        plan = self._scheduler.plan(scheduler_output)
        if plan.load_at_once and (worker := _worker_here()) is not None:
            worker.step_begins(plan)
        return KVCoreMetadata(plan)

    def update_connector_output(self, connector_output: Any) -> None:
        """Take in what the workers report."""
        if self._scheduler is not None:
            meta = connector_output.kv_connector_worker_meta
            self._scheduler.reported(
                meta.report() if isinstance(meta, KVCoreWorkerMetadata) else None,
                connector_output.invalid_block_ids or (),
                connector_output.finished_recving or (),
            )

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Let go of the request; its blocks need not be held for stores under way."""
        if self._scheduler is not None:
            self._scheduler.finished(request)
        return False, None

    def reset_cache(self) -> bool:
        """Forget: KV of before (of other weights, say) is not matched again by this engine. Others' is left alone.

        A worker in this process finishes its copies first: vLLM's sleep takes the cache's memory away right behind.
        """
        if (worker := _worker_here()) is not None:
            worker.drain()
        if self._scheduler is not None:
            self._scheduler.forget(uuid4().hex)
        return True

    # Both

    def get_kv_connector_stats(self) -> KVCoreStats | None:
        """Return what was counted since the last call."""
        side = self._scheduler or self._worker
        data = {} if side is None else side.counted()
        return KVCoreStats(data=data) if data else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVCoreStats:
        """Return counts as they came from workers or scheduler."""
        return KVCoreStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVCorePromMetrics:
        """Return the counts as Prometheus metrics."""
        return KVCorePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """No: a step that runs as one graph waits for its loads before it starts, others layer by layer."""
        return False

    def shutdown(self) -> None:
        """End what is under way, leave the server, and stop it where it is ours."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        if self._scheduler is not None:
            self._scheduler.close()
            self._scheduler = None
        if self._server is not None:
            self._server.stop()
            self._server = None


class KVCoreConnector(KVCoreMPConnector):
    """Reuses KV inside one vLLM instance: the same server, in a thread of the scheduler's process.

    Every setting of `kvcore serve` can be given in `kv_connector_extra_config` (`chunk_size`, `l1_size_gb`, ...) or in
    the environment (`KVCORE_CHUNK_SIZE`, `KVCORE_L1_SIZE_GB`). It ends, with what it holds, when vLLM ends.
    """

    _embedded = True

    def _start_server(self) -> EmbeddedServer:
        return EmbeddedServer(self._instance, self._settings.server)

    def _endpoint(self) -> str:
        return embedded_settings(self._instance, self._settings.server).endpoints[0]

    @property
    def _deadline_s(self) -> float:
        """A server in a thread cannot die alone, but the engine may keep the interpreter to itself for a while."""
        return max(super()._deadline_s, _EMBEDDED_DEADLINE_S)


def _worker_here() -> WorkerSide | None:
    """The worker's half, where it lives in this process."""
    for one in compat.connectors(compat.worker_connector()):
        if isinstance(one, KVCoreMPConnector):
            return one._worker
    return None


# MultiConnector looks the connectors that it has made up by name, also those that were given by their module.
compat.register("kvcore.vllm", [KVCoreMPConnector.__name__, KVCoreConnector.__name__])
