"""Several processes: what can be said before there are any; tests/hosts starts them."""

import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from sinkjax.sharding import make_mesh
from sinkjax.train import DistributedConfig, joined, witness
from sinkjax.train.data import local_rows, place


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((), None),
        (("auto",), None),
        (("explicit", "host:1234", 3, 2), None),
        (("explicit", "[::1]:1234", 3, 0), None),
        (("explicit",), "coordinator: expected a value with distributed.mode='explicit', got None"),
        (("explicit", "h:1", 2), "process_id: expected a value with .*got None"),
        (("off", "h:1"), "coordinator: expected none without .*'explicit', got 'h:1'"),
        (("auto", None, 2), "num_processes: expected none without"),
        (("explicit", "host", 2, 0), "coordinator: expected HOST:PORT, got 'host'"),
        (("explicit", ":80", 2, 0), "coordinator: expected HOST:PORT"),
        (("explicit", "h:70000", 2, 0), "coordinator: expected HOST:PORT"),
        (("explicit", "h:1", 0, 0), "num_processes: expected at least 1, got 0"),
        (("explicit", "h:1", 2, 2), "process_id: expected 0 to 1, got 2"),
        (("explicit", "h:1", 2, -1), "process_id: expected 0 to 1, got -1"),
        (("auto", None, None, None, 0), "connect_timeout_seconds: expected at least 1, got 0"),
        (("auto", None, None, None, 9, 2), "heartbeat_timeout_seconds: expected at least 3, got 2"),
    ],
)
def test_flags_that_do_not_make_a_whole_are_refused(fields, message):
    if message is None:
        assert DistributedConfig(*fields).heartbeat_timeout_seconds == 20
    else:
        with pytest.raises(ValueError, match=f"distributed.{message}"):
            DistributedConfig(*fields)


def test_off_is_nothing_and_a_process_0_that_cannot_be_is_told_at_once():
    with joined(DistributedConfig()):
        assert not jax.distributed.is_initialized()
    with socket.create_server(("", 0)) as server:
        taken = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(OSError, match=f"in use: 'distributed.coordinator {taken}'"):
            with joined(DistributedConfig("explicit", taken, 2, 0)):
                pass
    # Nobody listens there any more.
    with pytest.raises(TimeoutError, match=f"expected process 0 at {taken}, got no answer in 1 s"):
        with joined(DistributedConfig("explicit", taken, 2, 1, connect_timeout_seconds=1)):
            pass


def test_a_witness_tells_of_an_abort_and_of_a_kill_and_of_nothing_else():
    script = """
        import os, runpy, signal, sys
        witness = runpy.run_path(sys.argv[1])["Witness"]()
        witness.says("was  aborted\\n", "was killed")
        if sys.argv[2] == "end":
            witness.dismiss()
        elif sys.argv[2] == "abort":
            os.abort()
        else:
            os.kill(os.getpid(), int(sys.argv[2]))
        os._exit(3)
    """
    pipe, words = subprocess.PIPE, [sys.executable, "-S", "-c", textwrap.dedent(script)]
    ways = {"end": "", "abort": "was aborted\n", "9": "was killed\n", "15": "was killed\n"}
    running = {
        way: subprocess.Popen([*words, witness.__file__, way], stderr=pipe, text=True)
        for way in ways
    }
    assert {way: process.communicate()[1] for way, process in running.items()} == ways


def test_rows_lie_where_the_mesh_says():
    mesh = make_mesh()
    batch = {"tokens": np.arange(5 * 7, dtype=np.int32).reshape(5, 7)}
    rows = local_rows(mesh, 5)
    assert rows == (0, 1, 2, 3, 4)
    np.testing.assert_array_equal(place(batch, rows, 5, mesh)["tokens"], batch["tokens"])
