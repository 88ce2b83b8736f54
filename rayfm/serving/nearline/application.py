"""Starting near-line labelling on Ray Serve, beside the teacher's service."""

from __future__ import annotations

from typing import Any

from rayfm.config import ConfigError
from rayfm.serving.application import _DEPLOYING, LOOPBACK, application_name
from rayfm.serving.http.config import EndpointsConfig
from rayfm.serving.http.token import TokenCheck, check_bind
from rayfm.serving.nearline.config import NearLineConfig
from rayfm.serving.nearline.doorbell import Doorbell, task_processor
from rayfm.serving.nearline.holds import open_holds
from rayfm.serving.nearline.intake import Intake
from rayfm.serving.nearline.labeller import Score
from rayfm.serving.nearline.router import build_app
from rayfm.serving.nearline.rows import Versions
from rayfm.serving.nearline.spool import Spool
from rayfm.serving.proxies import QUIET, Door, all_or_nothing, check_free, open_door
from rayfm.serving.replicas import selector
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.metadata import open_metadata


def consumer_name(config: NearLineConfig) -> str:
    """Name of the Serve application of a teacher's consumers."""
    return f"{application_name(config.run, config.teacher)}-nearline"


def intake_name(run: str) -> str:
    """Name of the Serve application that takes a run's posts."""
    return f"rayfm-{run}-nearline"


def make_intake(config: NearLineConfig) -> Intake:
    """Where a teacher's posts go to: in a server of one's own, or in `start_nearline`'s."""
    store = SnapshotStore(config.root)
    metadata = None if config.metadata is None else open_metadata(config.metadata)
    return Intake(
        config,
        Spool(config.root, config.teacher),
        Versions(store, config.model, config.version, metadata),
        Doorbell(config),
        open_holds(config.metadata, store, config.model, config.hold_s),
    )


def autoscaling(config: NearLineConfig) -> dict[str, Any]:
    """How many consumers run: options of ``serve.deployment``."""
    consumer = config.consumer
    if consumer.max_replicas == consumer.replicas:
        return {"num_replicas": consumer.replicas}
    from ray.serve.async_inference_autoscaling_policy import AsyncInferenceAutoscalingPolicy
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=consumer.replicas,
            max_replicas=consumer.max_replicas,
            target_ongoing_requests=consumer.queue_per_replica,
            upscale_delay_s=2 * consumer.poll_s,
            downscale_delay_s=12 * consumer.poll_s,
            policy=AutoscalingPolicy(
                policy_function=AsyncInferenceAutoscalingPolicy,
                policy_kwargs={
                    "broker_url": config.broker,
                    "queue_name": config.queue,
                    "poll_interval_s": consumer.poll_s,
                },
            ),
        )
    }


def start_consumers(config: NearLineConfig, score: Score | None = None) -> Any:
    """Deploy a teacher's consumers and return their handle. The teacher's service runs already.

    Args:
        config: the teacher's.
        score: asks the teacher; by default its service.
    """
    from ray import serve

    with _DEPLOYING:
        open_door(None)
        return serve.run(bind_consumers(config, score), name=consumer_name(config), route_prefix=None)


def bind_consumers(config: NearLineConfig, score: Score | None = None) -> Any:
    """The Serve application of a teacher's consumers; arguments as of `start_consumers`."""
    from ray import serve
    from ray.serve.task_consumer import task_consumer

    # Not above: it imports ray.serve, which reads its environment then, and `rayfm serve --production` sets that late.
    from rayfm.serving.nearline.consumer import NearLineConsumer

    consumer = config.consumer
    deployment: Any = serve.deployment(
        task_consumer(task_processor_config=task_processor(config))(NearLineConsumer),
        name="NearLineConsumer",
        max_ongoing_requests=consumer.tickets,  # Celery's threads
        health_check_period_s=consumer.health_s,
        health_check_timeout_s=max(10.0, consumer.health_s),
        graceful_shutdown_timeout_s=10.0,
        ray_actor_options={"num_cpus": consumer.cpus, **selector(consumer.nodes)},
        logging_config=QUIET,
        **autoscaling(config),
    )
    return deployment.bind(config.dump(), application_name(config.run, config.teacher), score)


def start_intake(
    configs: list[NearLineConfig],
    http_port: int,
    cpus: float = 0.25,
    host: str = LOOPBACK,
    token: str | None = None,
) -> str:
    """Take posts for teachers of one run; returns the URL.

    Args:
        configs: one a teacher.
        http_port, host: where to listen.
        cpus: what the process that accepts reserves.
        token: the bearer token that every request needs; None only on loopback.

    Raises:
        ConfigError: the configs are of several runs, or of one teacher twice; others could post without a token.
        CapacityError: the port is in use, Ray Serve runs already and listens elsewhere, or the run has an intake there.
    """
    from ray import serve

    if len({config.run for config in configs}) != 1 or len({config.teacher for config in configs}) != len(configs):
        raise ConfigError("near-line configs of one intake: give each teacher of one run once")
    check_bind(EndpointsConfig(host=host, http_port=http_port), token)
    plain, check = [config.dump() for config in configs], TokenCheck(token)

    def build() -> Any:
        loaded = [NearLineConfig.model_validate(config) for config in plain]
        return build_app({config.teacher: make_intake(config) for config in loaded}, check)

    name = intake_name(configs[0].run)
    with _DEPLOYING:
        open_door(Door(host, http_port), "--port PORT")
        check_free(name, f"the intake of run {configs[0].run!r}")
        deployment: Any = serve.deployment(
            serve.ingress(build)(),
            name="NearLineIntake",
            max_ongoing_requests=32,
            ray_actor_options={"num_cpus": cpus},
            logging_config=QUIET,
        )
        with all_or_nothing([name]):
            serve.run(deployment.bind(), name=name, route_prefix="/")
    return f"http://{host}:{http_port}"


def stop_nearline(config: NearLineConfig) -> None:
    """Remove a teacher's consumers and its run's intake; what is accepted stays on disk until they run again."""
    from ray import serve

    for name in (intake_name(config.run), consumer_name(config)):
        serve.delete(name)
