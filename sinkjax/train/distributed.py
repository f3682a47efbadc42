"""Several processes, usually one per host, as one program."""

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax

from sinkjax.train.watch import Watch
from sinkjax.train.witness import Witness

# jax ends the survivors of a lost process too, in C++ and without a name. Its processes beat twice
# in its timeout, so that it may do so after half of it: the watch shall be first, and by default
# both within a minute.
_JAX_HEARTBEAT = 2.8


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find one another; no part of what makes it that run.

    Args:
      mode: "off" for one process; "auto" asks Cloud TPU, GKE, Slurm or Open MPI; "explicit" takes
        the three fields that follow.
      coordinator: HOST:PORT at which process 0 can be reached by all; any free port.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      connect_timeout_seconds: how long to wait until all are there.
      heartbeat_timeout_seconds: silence after which a process counts as lost and all others stop.
    """

    mode: Literal["off", "auto", "explicit"] = "off"
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    connect_timeout_seconds: int = 300
    heartbeat_timeout_seconds: int = 20

    def __post_init__(self) -> None:
        wanted = self.mode == "explicit"
        for name in ("coordinator", "num_processes", "process_id"):
            expected = "a value with" if wanted else "none without"
            given = getattr(self, name)
            fine = (given is not None) == wanted
            _check(name, f"{expected} distributed.mode='explicit'", given, fine)
        if wanted:
            _host_and_port(str(self.coordinator))
            count, process = self.num_processes or 0, self.process_id or 0
            _check("num_processes", "at least 1", count, count >= 1)
            _check("process_id", f"0 to {count - 1}", process, 0 <= process < count)
        for name, least in (("connect_timeout_seconds", 1), ("heartbeat_timeout_seconds", 3)):
            seconds = getattr(self, name)
            _check(name, f"at least {least}", seconds, seconds >= least)


def _check(name: str, expected: str, got: Any, fine: bool) -> None:
    if not fine:
        raise ValueError(f"distributed.{name}: expected {expected}, got {got!r}")


def _host_and_port(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    fine = bool(host) and port.isdigit() and 0 < int(port) < 2**16
    _check("coordinator", "HOST:PORT", coordinator, fine)
    return host.strip("[]"), int(port)


@contextlib.contextmanager
def joined(config: DistributedConfig) -> Iterator[None]:
    """Make this process one of several for the time of the block; all enter, and leave together.

    Inside, `jax.devices()` are those of all processes. If one is lost, the others print which and
    end with status 1 after `heartbeat_timeout_seconds` and a few more; if one leaves the block with
    an exception, the others print it and end with status 1.

    Args:
      config: how they find one another; with mode "off" nothing happens.

    Raises:
      ValueError: "auto" finds no cluster.
      OSError: process 0 cannot be reached in time, or its port is taken.
      RuntimeError: jax has been initialised already, or has used its devices.

    Example:
      >>> with joined(DistributedConfig()):
      ...     jax.process_count()
      1
    """
    if config.mode == "off":
        yield
        return
    if jax.distributed.is_initialized():
        raise RuntimeError("joined: expected jax.distributed not to be initialised yet")
    witness = Witness()
    try:
        _connect(config, witness)
        watch = Watch(witness, config.heartbeat_timeout_seconds)
        try:
            yield
        except BaseException as error:
            watch.fail(error)
            raise
        watch.done()
    finally:
        witness.dismiss()


def _connect(config: DistributedConfig, witness: Witness) -> None:
    seconds = config.connect_timeout_seconds
    late = f"the processes did not all come together within {seconds} s"
    if config.mode == "explicit":
        late = f"{late}: {config.num_processes} are expected at {config.coordinator}"
        _probe(config)
    # jax aborts the process when the time is over.
    witness.says(f"sinkjax: {late}", "")
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            cluster_detection_method="deactivate" if config.mode == "explicit" else None,
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=round(_JAX_HEARTBEAT * config.heartbeat_timeout_seconds),
        )
    except ValueError as error:
        raise ValueError(
            "distributed.mode: expected a process of Cloud TPU, GKE, Slurm or Open MPI with 'auto', "
            f"got none ({error})"
        ) from error


def _probe(config: DistributedConfig) -> None:
    """What jax would wait long for, or not say: a taken port, a process 0 that is not there."""
    host, port = _host_and_port(str(config.coordinator))
    if config.process_id == 0:
        try:
            with socket.create_server(("", port)):
                return
        except OSError as error:
            code = error.errno or 0
            where = f"distributed.coordinator {config.coordinator}"
            raise OSError(code, os.strerror(code), where) from error
    end = time.monotonic() + config.connect_timeout_seconds
    while True:
        try:
            with socket.create_connection((host, port), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"distributed.coordinator: expected process 0 at {config.coordinator}, got no "
                    f"answer in {config.connect_timeout_seconds} s ({error})"
                ) from error
        time.sleep(0.5)
