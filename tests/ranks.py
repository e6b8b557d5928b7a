"""Run a function on K gloo processes of this machine and collect what each returns."""

import os
import tempfile
import traceback

import torch

import dist


def run_ranks(world_size, function, *args):
    """function(*args) on `world_size` ranks -> list of its return values by rank. The function must be importable."""
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        ranks = [context.Process(target=_rank, args=(rank, world_size, folder, function, args)) for rank in range(world_size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        results = []
        for rank in range(world_size):
            path = os.path.join(folder, f"{rank}.pt")
            assert os.path.exists(path), f"rank {rank} died with exit status {ranks[rank].exitcode}"
            results.append(torch.load(path, weights_only=False))
        errors = [f"rank {rank}:\n{r}" for rank, r in enumerate(results) if isinstance(r, str) and r.startswith("Traceback")]
        assert not errors, "\n".join(errors)
        return results


def _rank(rank, world_size, folder, function, args):
    import torch.distributed as c10d
    torch.set_num_threads(1)
    c10d.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        result = function(*args)
        dist.barrier()                          # nobody goes while another is still at it
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, os.path.join(folder, f"{rank}.pt"))
    dist.leave()
