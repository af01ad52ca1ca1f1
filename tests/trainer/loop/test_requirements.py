"""Predicted memory against what DeepSpeed holds and what a process takes; predicted work against PyTorch's counter."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from objectives.objective import build_objective
from recommender.config import LoraConfig, PresetBackbone
from recommender.items.item_space import ItemSpace
from trainer.config import TrainingConfig
from trainer.data.dataset import Dataset
from trainer.experiment import Experiment
from trainer.loop.module import TrainedModel
from trainer.loop.requirements import Shape, memory, requirements
from trainer.loop.rows import TrainingRows
from trainer.loop.worker import micro_batch, starting_backbone
from trainer.parts import Prepared

ROOT = Path(__file__).parents[3]
CASES = [(stage, lora, "bfloat16" if (stage + lora) % 2 else "float32") for stage in range(4) for lora in (0, 1)]

# Two ranks; after each case's backward pass rank 0 prints the case, its weights and the bytes of all tensors it holds.
STATES = """
import gc, logging, os, sys
import torch, torch.distributed as dist, torch.multiprocessing as mp
os.environ["DS_ACCELERATOR"] = "cpu"

def held():
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return {at: size for at, size in storages.items() if size < 500_000_000}  # without DeepSpeed's buckets

def run(rank, port, cases):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    logging.disable(logging.WARNING)
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from trainer.config import TrainingConfig
    from trainer.loop.engine import build_engine

    class Summed(torch.nn.Module):
        def __init__(self, lora, precision):
            super().__init__()
            shape = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4)
            model = LlamaForCausalLM(LlamaConfig(vocab_size=4000, tie_word_embeddings=True, **shape))
            self.model = model.to(getattr(torch, precision))
            if lora:
                self.model = get_peft_model(self.model, LoraConfig(r=64, target_modules="all-linear"))

        def forward(self, tokens):
            return self.model(tokens).logits.float().logsumexp(-1).sum()

    for stage, lora, precision in cases:
        before = held()
        engine = build_engine(Summed(lora, precision), TrainingConfig(zero_stage=stage, precision=precision))
        engine.backward(engine(torch.randint(0, 4000, (1, 8))))
        bytes_held = sum(size for at, size in held().items() if at not in before)
        if rank == 0:
            numel = lambda p: getattr(p, "ds_numel", p.numel())
            parameters = list(engine.module.parameters())
            counts = [sum(numel(p) for p in parameters if p.requires_grad is own) for own in (True, False)]
            print("held", [stage, lora, *counts, bytes_held], flush=True)
        engine.step()
        engine.destroy()
        del engine

if __name__ == "__main__":
    mp.spawn(run, (sys.argv[1], eval(sys.argv[2])), nprocs=2)
"""

# One rank; one optimiser step of an experiment. Prints how far the process grew.
PEAK = """
import os, sys
os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1], "LOCAL_RANK": "0"}
from pathlib import Path
import deepspeed, torch, torch.distributed as dist
from objectives.objective import build_objective
from recommender.items.item_space import ItemSpace
from trainer.data.dataset import Dataset
from trainer.loop.engine import build_engine
from trainer.experiment import Experiment
from trainer.loop.module import TrainedModel
from trainer.loop.plan import BatchPlan
from trainer.loop.rows import TrainingRows
from trainer.parts import Prepared
from trainer.loop.worker import optimiser_step, starting_backbone

def kilobytes(name):  # VmHWM is this program's own peak; getrusage's that of what started it, where that is larger
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

dist.init_process_group("gloo", rank=0, world_size=1)
experiment, prepared = Experiment.model_validate_json(sys.argv[2]), Prepared(Path(sys.argv[3]), Path(sys.argv[4]))
training, space = experiment.training, ItemSpace.load(prepared.items)
objective = build_objective(experiment.objective, 6, space.trie)
rows = TrainingRows(Dataset.load(prepared.dataset), space, training, objective.branching_only)
plan = BatchPlan(rows.lengths, rows.counted, training.batch_tokens, training.seed)
warm = starting_backbone(experiment, space)  # whatever transformers loads at first
del warm
start = kilobytes("VmRSS")
backbone = starting_backbone(experiment, space)
if training.gradient_checkpointing:
    backbone.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
module = TrainedModel(backbone, objective, space.trie, logits_memory_mb=training.logits_memory_mb)
optimiser_step(build_engine(module, training), module, plan.epoch(0)[0], rows)
print("grew", (kilobytes("VmHWM") - start) * 1024)
"""


def child(script: str, *arguments: str) -> str:
    """What a process prints that gives memory back at once; ranks that it spawns need its script as a file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, script, port, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_states_are_what_deepspeed_holds(tmp_path: Path) -> None:
    script = tmp_path / "states.py"
    script.write_text(STATES)
    lines = [line for line in child(str(script), repr(CASES)).splitlines() if line.startswith("held")]
    assert len(lines) == len(CASES)
    for line, (_, _, precision) in zip(lines, CASES, strict=True):
        stage, lora, trained, frozen, held = json.loads(line.removeprefix("held"))
        assert bool(frozen) is bool(lora)
        shape = Shape(trained, frozen, 0, 0, 256, 4, 256, 704, 4000)
        of = memory(shape, TrainingConfig(zero_stage=stage, precision=precision), workers=2, gpu=False, tokens=8)
        assert of.weights + of.gradients + of.optimizer == pytest.approx(held, rel=0.05), line


@pytest.fixture
def one_step(tiny_experiment: Experiment) -> Experiment:
    """A backbone and a batch that are large beside what a process takes anyway."""
    changes: dict[str, Any] = {
        "backbone": PresetBackbone(size="small", vocabulary=400),
        "training": tiny_experiment.training.model_copy(update={"batch_tokens": 5000, "logits_memory_mb": 16}),
        "cluster": tiny_experiment.cluster.model_copy(update={"workers": 1}),
    }
    return tiny_experiment.model_copy(update=changes)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_peak_is_what_a_process_grows_by(
    one_step: Experiment, tiny_prepared: Prepared, tmp_path: Path, recompute: bool
) -> None:
    training = one_step.training.model_copy(update={"gradient_checkpointing": recompute})
    experiment = one_step.model_copy(update={"training": training})
    predicted = requirements(experiment, tiny_prepared).memory().total
    script = tmp_path / "peak.py"
    script.write_text(PEAK)
    grew = []
    for _ in range(3):  # what is freed late, by chance, only adds
        text = child(str(script), experiment.model_dump_json(), *map(str, (tiny_prepared.dataset, tiny_prepared.items)))
        grew.append(int(text.splitlines()[-1].removeprefix("grew ")))
        if grew[-1] <= 1.25 * predicted:
            break
    assert predicted == pytest.approx(min(grew), rel=0.25)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=8)])
def test_matrix_products_are_those_that_pytorch_counts(
    one_step: Experiment, tiny_prepared: Prepared, lora: LoraConfig | None
) -> None:
    backbone_config = PresetBackbone(size="tiny", vocabulary=400).model_copy(update={"lora": lora})
    experiment = one_step.model_copy(update={"backbone": backbone_config})
    needs = requirements(experiment, tiny_prepared)
    space, dataset = ItemSpace.load(tiny_prepared.items), Dataset.load(tiny_prepared.dataset)
    backbone = starting_backbone(experiment, space)
    assert needs.shape == Shape.of(backbone)
    objective = build_objective(experiment.objective, backbone.num_layers, space.trie)
    module = TrainedModel(backbone, objective, space.trie)
    rows = TrainingRows(dataset, space, experiment.training, objective.branching_only)
    with FlopCounterMode(display=False) as counter:
        for numbers in np.array_split(np.argsort(rows.lengths), 8):
            module(micro_batch(module, rows, numbers)).backward()
    assert needs.flops == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_validation_at_stage_3_needs_a_whole_copy() -> None:
    shape = Shape(13_000_000_000, 0, 12_000_000_000, 12_000_000_000, 5120, 40, 5120, 13824, 32_000)
    training = TrainingConfig(zero_stage=3, precision="bfloat16", gradient_checkpointing=True)
    of = memory(shape, training, workers=64, gpu=True, tokens=2000)
    assert of.validation == 26e9
    assert of.total > of.validation > of.activations + of.logits
    assert memory(shape, training.model_copy(update={"zero_stage": 2}), 64, True, 2000).validation == 0


def test_what_fits_is_the_smallest_change(one_step: Experiment, tiny_prepared: Prepared) -> None:
    needs = requirements(one_step, tiny_prepared)
    as_it_is = needs.memory().total
    assert needs.that_fit(as_it_is) == {}
    changes = needs.that_fit(as_it_is * 0.8)
    assert changes is not None
    assert needs.memory(**changes).total <= as_it_is * 0.8
    assert needs.that_fit(2**20) is None
