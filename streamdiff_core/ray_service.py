"""``streamdiff serve --ray``: the service as replicas under Ray Serve, on this computer or on a running cluster.

Here is the driver: it starts Ray or joins it, deploys ``ray_replica`` and ends it again. A replica that is scaled away
takes no new connections and stays until its streams have left; at the end of the service all replicas first let out
what is in flight. Ray itself is imported when it is needed. Source: none, SPEC §6.5 ends at one machine.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from streamdiff_core.live_routes import listen
from streamdiff_core.pipeline import StreamPipeline
from streamdiff_core.serving import ServiceOptions, check_exposure

NAME = "streamdiff"
QUIET = {"log_level": "WARNING", "enable_access_log": False}
LOCAL_RAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray then binds to the loopback address, on Linux too
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # the default of 5 s is too little on busy cores
}
"""Settings that Ray reads when it is imported, here and in its processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RayOptions:
    """How many replicas, of what size, and where."""

    address: str = "local"
    """``local`` starts Ray on this computer only; ``auto`` or HOST:PORT joins a cluster."""
    min_replicas: int = 1
    """There are never fewer."""
    max_replicas: int = 1
    """There are never more; Ray scales between the two."""
    cpus: float = 1
    """Cores of a replica, which are also PyTorch's threads."""
    gpus: float = 0
    """GPUs of a replica."""
    look_back_s: float = 30.0
    """Load is the mean over so long."""
    upscale_delay_s: float = 10.0
    """Load is high for so long before a replica is added."""
    downscale_delay_s: float = 300.0
    """Load is low for so long before one is taken away."""
    leave_s: float = 3600.0
    """A replica that is taken away ends at the latest after so long, whoever is still there."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(f"replicas must be at least 1, and in order; got {self.min_replicas}-{self.max_replicas}")


class RayService:
    """The service while it runs.

    Args:
        load: makes the pipeline; called once in each replica.
        options: limits of each replica.
        ray_options: how many, and where.

    Raises:
        ValueError: other computers could connect without a token.
        OSError: the port is taken, or the address is not one of this computer (on a cluster: Ray's RuntimeError).
        ConnectionError: there is no cluster at the address.
        RuntimeError: the replicas do not come up; Ray's reason is in the text.
    """

    def __init__(
        self,
        load: Callable[[], StreamPipeline],
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        options: ServiceOptions = ServiceOptions(),  # noqa: B008 (frozen)
        ray_options: RayOptions = RayOptions(),  # noqa: B008 (frozen)
    ) -> None:
        check_exposure(host, options.token)
        self._is_local, self._is_closed = ray_options.address == "local", False
        if self._is_local:  # Ray's own answer to a taken port comes late and is long
            listen(host, (port,)).close()
        connect(ray_options)
        from ray import serve

        replicas = deployment(ray_options, options).bind(load, options, self._is_local)
        try:
            serve.start(http_options={"host": host, "port": port}, logging_config=QUIET)
            serve.run(replicas, name=NAME, logging_config=QUIET)
        except RuntimeError as error:
            app = serve.status().applications.get(NAME)
            reason = " ".join(state.message for state in app.deployments.values()).strip() if app else ""
            self._end()
            raise RuntimeError(f"the replicas do not come up: {reason or error}") from error
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        """Let out what is in flight, then end the replicas, and Ray too where it was started here."""
        from ray import serve

        if not self._is_closed:
            self._is_closed = True
            try:
                serve.delete(NAME)
            finally:
                self._end()

    def _end(self) -> None:
        import ray
        from ray import serve

        if self._is_local:
            serve.shutdown()
        ray.shutdown()


def connect(options: RayOptions) -> None:
    """Start Ray on this computer, reachable from nowhere else, or join a cluster.

    Raises:
        ConnectionError: there is no cluster at the address.
    """
    is_local = options.address == "local"
    if is_local:
        os.environ.update(LOCAL_RAY)
    import ray

    if is_local:  # the same for this process, where ray may have been imported before
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False

    own = {
        "num_cpus": math.ceil(options.max_replicas * options.cpus) + 1,
        "include_dashboard": False,
        "object_store_memory": 128 * 2**20,  # frames do not pass through it
    }
    ray.init(options.address, logging_level="ERROR", log_to_driver=False, **own if is_local else {})


def deployment(ray_options: RayOptions, options: ServiceOptions) -> Any:
    """The replicas as Ray Serve should run them."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

    from streamdiff_core.ray_replica import Replica

    o = ray_options
    return serve.deployment(Replica).options(
        name="engine",
        max_ongoing_requests=options.max_connections + 8,  # beside the streams: metrics, downloads
        ray_actor_options={"num_cpus": o.cpus, "num_gpus": o.gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=o.min_replicas, max_replicas=o.max_replicas,
            look_back_period_s=o.look_back_s, metrics_interval_s=o.look_back_s / 3,
            upscale_delay_s=o.upscale_delay_s, downscale_delay_s=o.downscale_delay_s,
            policy=AutoscalingPolicy(policy_function="streamdiff_core.ray_rules:scale_by_load"),
        ),
        request_router_config=RequestRouterConfig(request_router_class="streamdiff_core.ray_rules.SessionRouter"),
        graceful_shutdown_timeout_s=o.leave_s,
        graceful_shutdown_wait_loop_s=1.0,
        max_constructor_retry_count=2,
    )  # fmt: skip


def serve(
    load: Callable[[], StreamPipeline], *, host: str, port: int, options: ServiceOptions, ray_options: RayOptions
) -> None:
    """Run the service until a signal.

    Raises:
        ValueError, OSError, RuntimeError: as for ``RayService``.
    """
    stop = threading.Event()
    service = RayService(load, host=host, port=port, options=options, ray_options=ray_options)
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray's own
        signal.signal(number, lambda *_: stop.set())
    replicas = f"{ray_options.min_replicas} to {ray_options.max_replicas} replicas"
    print(f"streamdiff serve: ws://{host}:{port}/stream  ({replicas}; Ctrl-C ends it)", flush=True)
    stop.wait()
    service.close()
