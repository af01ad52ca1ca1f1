"""What one rank finds wrong, on two ranks of gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys
import torch, torch.distributed as dist, torch.multiprocessing as mp
from recommender.errors import UserError
from trainer.loop.agreement import agreed

def run(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}/meeting", rank=rank, world_size=2)
    with agreed(torch.device("cpu")):
        pass
    for faulty in (0, 1):
        try:
            with agreed(torch.device("cpu")):
                if rank == faulty:
                    raise UserError(f"rank {rank} lacks a file – über all")
        except UserError as error:
            with open(f"{path}/{rank}", "a") as file:
                print(error, file=file)
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(run, (sys.argv[1],), nprocs=2)
"""


def test_a_user_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(program), str(tmp_path)], env=environment, check=True, timeout=120)
    expected = "rank 0 lacks a file – über all\nrank 1 lacks a file – über all\n"
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == [expected] * 2
