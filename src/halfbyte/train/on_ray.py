"""``--ray ADDRESS``: the same run in the workers of a Ray cluster (Ray Train 2.60, extra ``ray``).

Ray places the workers, makes their process group and tells each its number; the rest is
:func:`halfbyte.train.run.fine_tune`, as under torchrun. The run folder has to be on a file system that all workers see.
What the first worker tells comes back through a queue; Ray's own checkpoints and reports are not used, and its usage
statistics are off. Ctrl-C ends the workers at once.
"""

import contextlib
import importlib.util
import logging
import os
import shutil
import threading
import uuid
from typing import Any

from halfbyte.errors import InputError
from halfbyte.runs.config import TrainConfig
from halfbyte.runs.events import Listener


def fine_tune_on_ray(config: TrainConfig, tell: Listener) -> None:
    """Train as ``config`` says in ``config.processes`` workers of the Ray cluster at ``config.ray``.

    Args:
        config: the options.
        tell: hears the events of the run.

    Raises:
        InputError: Ray is not installed, there is no such cluster, it has too few cores, or the run ends with one.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError("--ray needs Ray, which is not installed: pip install 'halfbyte[ray]'.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    try:
        ray.init(None if config.ray == "local" else config.ray, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise InputError(f"There is no Ray cluster at {config.ray} ({said}); start one, or say local.") from error
    storage = config.output.parent / f".ray-{uuid.uuid4().hex[:8]}"
    try:
        cores, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
        if config.processes > cores:
            raise InputError(f"The Ray cluster has {cores} cores, too few for {config.processes} processes.")
        events = Queue(actor_options={"num_cpus": 0})
        use_gpu = config.device != "cpu" and gpus >= config.processes
        each = {"CPU": cores // config.processes}
        trainer = TorchTrainer(
            _work,
            train_loop_config={
                "options": config.model_dump(mode="json", exclude_unset=True, exclude={"ray"}),
                "events": events,
            },
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=config.processes, use_gpu=use_gpu, resources_per_worker=each),
            run_config=RunConfig(storage_path=str(storage)),
        )
        told: list[str] = []
        heard = threading.Thread(target=_hear, args=(events, tell, told))
        heard.start()
        try:
            trainer.fit()
        finally:
            events.put(None)
            heard.join()
        if told:
            raise InputError(told[0])
    finally:
        ray.shutdown()
        with contextlib.suppress(OSError):
            shutil.rmtree(storage)


def _work(given: dict[str, Any]) -> None:
    """Train in a worker; the first one tells the sentence that ends the run, wherever that was said."""
    from halfbyte.hf.trainers.distributed import is_first
    from halfbyte.train.run import fine_tune

    events = given["events"]
    try:
        fine_tune(TrainConfig.from_yaml(None, given["options"]), events.put)
    except InputError as error:
        if is_first():
            events.put(str(error))


def _hear(events: Any, tell: Listener, told: list[str]) -> None:
    """Tell what comes through the queue until None does; sentences are put into ``told``."""
    while (event := events.get()) is not None:
        if isinstance(event, str):
            told.append(event)
        else:
            tell(event)
