"""Functions on several ranks, for tests. Each rank is a process, forked from a server.

The server is this file as a program: a process that has imported what a rank needs and done nothing
else, so that it has no threads when it forks. A rank that starts afresh spends four seconds of a
core on importing torch.
"""

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import traceback
from functools import lru_cache

import torch
import torch.distributed as c10d

import dist
import eval  # noqa: F401 (for the ranks)
import train  # noqa: F401 (for the ranks)
from runtime import ranks


def run_ranks(world_size, function, *args):
    """function(*args) on `world_size` ranks -> list of its results by rank.

    The function must be importable, because each rank is another process than this.
    """
    with tempfile.TemporaryDirectory() as folder:
        statuses = server().run(world_size, folder, pickle.dumps((function, args)))

        results = []
        for rank, status in enumerate(statuses):
            path = os.path.join(folder, f"{rank}.pt")
            assert os.path.exists(path), f"rank {rank} died with exit status {status}"
            results.append(torch.load(path, weights_only=False))

    errors = []
    for rank, result in enumerate(results):
        if isinstance(result, str) and result.startswith("Traceback"):
            errors.append(f"rank {rank}:\n{result}")
    assert not errors, "\n".join(errors)
    return results


@lru_cache
def server():
    return Server()


class Server:
    """The server as this process sees it. It ends when this process does, at the latest."""

    def __init__(self):
        self.socket, other = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(other.fileno())],
            pass_fds=[other.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        other.close()
        self.replies = self.socket.makefile("rb")

    def run(self, world_size, folder, job):
        """Run a job, a pickled (function, args), on new ranks -> list of their exit statuses.

        They have the environment, stdout and stderr that this process has now.
        """
        # Files can only be sent along with data: a byte that says nothing.
        socket.send_fds(self.socket, [b"."], [1, 2])
        self.socket.sendall(pickle.dumps((world_size, folder, job, dict(os.environ))))
        return pickle.load(self.replies)


# ---- the server ----


def serve(connection):
    """Fork the ranks that are asked for, until the other side has closed the connection."""
    requests = connection.makefile("rb")
    while True:
        byte, outputs, _, _ = socket.recv_fds(connection, 1, 2)
        if not byte:
            return
        world_size, folder, job, environment = pickle.load(requests)

        processes = []
        for rank in range(world_size):
            process = os.fork()
            if process == 0:
                become_rank(rank, world_size, folder, job, environment, outputs)
            processes.append(process)
        for output in outputs:
            os.close(output)

        statuses = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in processes]
        connection.sendall(pickle.dumps(statuses))


def become_rank(rank, world_size, folder, job, environment, outputs):
    """Run the job as a rank, and exit. Its result, or its traceback, is saved in the folder."""
    try:
        for number, output in zip((1, 2), outputs):
            os.dup2(output, number)
        os.environ.clear()
        os.environ.update(environment)

        torch.set_num_threads(1)
        store = f"file://{folder}/store"
        c10d.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        try:
            function, args = pickle.loads(job)
            result = function(*args)
            dist.barrier()  # until all ranks are done
        except BaseException:
            result = traceback.format_exc()
        torch.save(result, os.path.join(folder, f"{rank}.pt"))
        ranks.leave()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
