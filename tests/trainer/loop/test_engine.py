"""Engine and checkpoint against plain PyTorch: many cases inside one Ray Train launch, as a launch costs the most.

`ILREC_FULL_PRODUCT=1 pytest tests/trainer/loop/test_engine.py` runs the full product instead of the pairwise cover.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recommender.errors import UserError
from trainer.config import TrainingConfig

STAGES, ACCUMULATIONS = (0, 1, 2, 3), (1, 2, 4)
LEARNING_RATES = (1e-3, 2e-3, 5e-4, 1e-3)
CLIPPING = 0.7  # below the norms that occur, so that it matters

PAIRWISE = [
    (stage, accumulation, (stage + row) % 2 == 0, "float32" if (stage // 2 + row) % 2 == 0 else "bfloat16")
    for row, accumulation in enumerate(ACCUMULATIONS)
    for stage in STAGES
]
PRODUCT = list(itertools.product(STAGES, ACCUMULATIONS, (False, True), ("float32", "bfloat16")))
CASES = PRODUCT if os.environ.get("ILREC_FULL_PRODUCT") else PAIRWISE
POISONED = [(0, "float32"), (0, "bfloat16"), (1, "bfloat16"), (2, "float32"), (3, "bfloat16")]
RESUMES = [  # (precision, stage of the run that saves, stage of the one that loads, LoRA)
    *(("float32", source, target, source % 2 == 0) for source, target in ((0, 3), (3, 2), (2, 1), (1, 0))),
    *(("bfloat16", source, target, source % 2 == 1) for source, target in ((0, 0), (2, 2), (3, 1), (1, 3))),
]


def training(**changes: Any) -> TrainingConfig:
    return TrainingConfig(weight_decay=0.1, betas=(0.9, 0.95), gradient_clipping=CLIPPING, **changes)


class SummedLoss(nn.Module):
    """A tied Llama, a vector that only some micro-batches use, and a layer that none does.

    The embedding has more than 1e5 elements, so that ZeRO 3 shards it; smaller parameters it keeps whole.
    """

    def __init__(self, lora: bool) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(5)
        config = LlamaConfig(
            vocab_size=1701,
            hidden_size=64,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
        self.model: nn.Module = LlamaForCausalLM(config)
        if lora:
            from peft import LoraConfig, get_peft_model

            adapters = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"])
            self.model = get_peft_model(self.model, adapters)
        with torch.no_grad():  # no zeros and ones: norms and LoRA's B matrices must matter
            for name, parameter in self.named_parameters():
                if parameter.dim() == 1 or "lora_B" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        self.sometimes = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]))
        self.never = nn.Linear(3, 5)

    def forward(self, batch: tuple[Tensor, bool]) -> Tensor:
        tokens, use_vector = batch
        logits = self.model(tokens).logits.float()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        return loss + (self.sometimes.float() * torch.arange(3.0)).sum() if use_vector else loss


def plan(step: int, slots: int, accumulation: int) -> tuple[list[tuple[Tensor, bool]], int]:
    """The micro-batches of an optimiser step, by rank and then turn, with uneven work, and the loss denominator.

    With 8 slots rank 1 has a micro-batch without work: a dummy row, which counts nothing.
    """
    generator = torch.Generator().manual_seed(100 + step)
    batches = []
    for slot in range(slots):
        shape = (1 + (3 * slot + step) % 4, 3 + (5 * slot + step) % 6)
        tokens = torch.randint(1, 1701, shape, generator=generator)
        batches.append((tokens, slot % accumulation == 0))
    if slots == 8:
        batches[6] = (torch.zeros(1, 3, dtype=torch.long), False)
    return batches, sum(tokens.shape[0] * (tokens.shape[1] - 1) for tokens, _ in batches if tokens.any())


@lru_cache
def reference(lora: bool, precision: str, slots: int, accumulation: int, steps: int) -> tuple[list[dict], dict, dict]:
    """Gradients of each step, final and first weights, by one process: autograd and AdamW over float32 masters."""
    module = SummedLoss(lora)
    if precision == "bfloat16":
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16()
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    masters = {name: parameter.detach().float().clone() for name, parameter in trained.items()}
    first = {name: master.clone() for name, master in masters.items()}
    decayed = {"params": [m for m in masters.values() if m.dim() > 1], "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(
        [decayed, {"params": [m for m in masters.values() if m.dim() <= 1], "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    gradients = []
    for step in range(steps):
        batches, denominator = plan(step, slots, accumulation)
        total = {name: torch.zeros_like(master) for name, master in masters.items()}
        for batch in batches:
            module.zero_grad()
            (module(batch) * (1 / denominator if batch[0].any() else 0.0)).backward()
            for name, parameter in trained.items():
                if parameter.grad is not None:
                    total[name] += parameter.grad.float()
        gradients.append(total)
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in total.values()))
        for name, master in masters.items():
            master.grad = total[name] * min(1.0, CLIPPING / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATES[step]
        optimizer.step()
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(masters[name])
    return gradients, masters, first


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """‖left - right‖ / ‖right‖ over all parameters."""
    difference = sum((left[name] - right[name]).square().sum().item() for name in right)
    return math.sqrt(difference / sum(value.square().sum().item() for value in right.values()))


def run_steps(engine: Any, steps: range, poison: int | None = None) -> list[dict[str, Tensor]]:
    """Optimiser steps over the plan; the whole gradients of each. Step `poison` has an infinite loss on rank 1."""
    from deepspeed.utils import safe_get_full_grad
    from torch import distributed as dist

    from trainer.loop.engine import loss_scale, set_learning_rate

    rank, ranks, accumulation = dist.get_rank(), dist.get_world_size(), engine.gradient_accumulation_steps()
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    gradients = []
    for step in steps:
        # one rank alone runs what two ranks ran: the same slots, twice the accumulation
        batches, denominator = plan(step, ranks * accumulation, accumulation if ranks == 2 else accumulation // 2)
        for turn in range(accumulation):
            batch = batches[rank * accumulation + turn]
            scale = loss_scale(engine) / denominator if batch[0].any() else 0.0
            if step == poison and rank == 1:
                scale = math.inf
            engine.backward(engine(batch) * scale)
            if turn == accumulation - 1:
                whole = {name: safe_get_full_grad(parameter) for name, parameter in trained.items()}
                gradients.append(
                    {n: torch.zeros_like(trained[n]) if g is None else g.float().clone() for n, g in whole.items()}
                )
                set_learning_rate(engine, LEARNING_RATES[step])
            engine.step()
    return gradients


def snapshot(engine: Any) -> dict[str, Tensor]:
    """Masters and moments by name, gathered."""
    from trainer.loop import checkpoint

    return {
        f"{key}/{name}": checkpoint._gather(engine, parameter, key).detach().clone()
        for name, parameter in checkpoint._trainable(engine)
        for key in (None, "exp_avg", "exp_avg_sq")
    }


def compare_case(stage: int, accumulation: int, lora: bool, precision: str) -> dict[str, float]:
    from torch import distributed as dist

    from trainer.loop.engine import build_engine, copy_weights, full_weights

    engine = build_engine(SummedLoss(lora), training(zero_stage=stage, accumulation=accumulation, precision=precision))
    gradients = run_steps(engine, range(3))
    state = snapshot(engine)
    replica = SummedLoss(lora).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    copy_weights(engine, replica)
    surplus = sum(1 for _ in full_weights(engine)) - sum(1 for _ in replica.parameters())
    norm = float(engine.get_global_grad_norm())
    engine.destroy()
    if dist.get_rank() > 0:  # leaves the cores to the reference
        return {}
    expected, masters, first = reference(lora, precision, 2 * accumulation, accumulation, 3)
    weights = dict(replica.named_parameters())
    moved = {name: state[f"None/{name}"] - first[name] for name in masters}
    return {
        "first gradient": distance(gradients[0], expected[0]),
        "gradients": max(distance(got, want) for got, want in zip(gradients, expected, strict=True)),
        "weights": max((state[f"None/{name}"] - master).abs().max().item() for name, master in masters.items()),
        "update": distance(moved, {name: masters[name] - first[name] for name in masters}),
        "norm": abs(norm / math.sqrt(sum(g.square().sum().item() for g in expected[2].values())) - 1),
        "replica": max(
            (weights[name].float() - state[f"None/{name}"].to(weights[name].dtype).float()).abs().max().item()
            for name in masters
        ),
        "full weights": float(surplus),
    }


def poison_case(stage: int, precision: str) -> dict[str, float]:
    """A step with a gradient that is not finite changes nothing; training goes on as if it had not been."""
    from trainer.loop.engine import build_engine

    engine = build_engine(SummedLoss(True), training(zero_stage=stage, accumulation=2, precision=precision))
    run_steps(engine, range(1))
    before = snapshot(engine)
    run_steps(engine, range(1, 2), poison=1)
    skipped = not engine.was_step_applied()
    after = snapshot(engine)
    run_steps(engine, range(2, 3))
    final = snapshot(engine)
    engine.destroy()
    return {
        "applied": float(not skipped),
        "changed": max((after[name] - before[name]).abs().max().item() for name in before),
        "bad": float(sum(not value.isfinite().all() for value in final.values())),
    }


def resume_case(precision: str, source: int, target: int, lora: bool, directory: Path) -> dict[str, float]:
    """Two steps, save, two steps; against: load into a fresh engine of another stage, two steps."""
    from trainer.loop import checkpoint
    from trainer.loop.engine import build_engine, full_weights

    first = build_engine(SummedLoss(lora), training(zero_stage=source, accumulation=2, precision=precision))
    run_steps(first, range(2))
    checkpoint.save(first, directory, {"position": 2})
    saved, saved_weights = snapshot(first), dict(full_weights(first))
    run_steps(first, range(2, 4))
    undisturbed = snapshot(first)
    first.destroy()

    second = build_engine(SummedLoss(lora), training(zero_stage=target, accumulation=2, precision=precision))
    state = checkpoint.load(second, directory)
    loaded, loaded_weights = snapshot(second), dict(full_weights(second))
    run_steps(second, range(2, 4))
    resumed = snapshot(second)
    second.destroy()
    worst = {
        "state": float(state != {"position": 2}),
        "loaded": max((loaded[name] - saved[name]).abs().max().item() for name in saved),
        "module": max((loaded_weights[n].float() - w.float()).abs().max().item() for n, w in saved_weights.items()),
        "resumed": max((resumed[name] - undisturbed[name]).abs().max().item() for name in undisturbed),
        "step count": float(checkpoint.read_state(directory)["optimizer_step"] - 2),
    }
    return worst


def untouched_case(directory: Path) -> dict[str, float]:
    """A checkpoint of an engine that has not taken a step: nothing moves, the bias correction starts at one."""
    from trainer.loop import checkpoint
    from trainer.loop.engine import build_engine

    engine = build_engine(SummedLoss(False), training(zero_stage=2, accumulation=1))
    checkpoint.save(engine, directory, {})
    run_steps(engine, range(1))
    _, masters, _ = reference(False, "float32", 2, 1, 1)
    state = snapshot(engine)
    engine.destroy()
    return {"weights": max((state[f"None/{name}"] - master).abs().max().item() for name, master in masters.items())}


def complaint(directory: Path, lora: bool) -> str:
    from trainer.loop import checkpoint
    from trainer.loop.engine import build_engine

    engine = build_engine(SummedLoss(lora), training(zero_stage=2))
    try:
        checkpoint.load(engine, directory)
    except UserError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def two_workers(config: dict[str, Any]) -> dict[str, Any]:
    from torch import distributed as dist

    directory = Path(config["directory"])
    results: dict[str, Any] = {"compare": {}, "poison": {}, "resume": {}}
    for case in config["cases"]:
        results["compare"][tuple(case)] = compare_case(*case)
    for case in POISONED:
        results["poison"][case] = poison_case(*case)
    for precision, source, target, lora in config["resumes"]:
        where = directory / f"{precision}-{source}-{target}"
        results["resume"][precision, source, target, lora] = resume_case(precision, source, target, lora, where)
    results["untouched"] = untouched_case(directory / "untouched")

    good = directory / "float32-3-2"  # of full weights, as 3 is odd
    if dist.get_rank() == 0:
        for name in ("no-state", "no-shard", "cut-shard"):
            shutil.copytree(good, directory / name)
        (directory / "no-state" / "state.json").unlink()
        (directory / "no-shard" / "shard-00001-of-00002.safetensors").unlink()
        cut = directory / "cut-shard" / "shard-00000-of-00002.safetensors"
        cut.write_bytes(cut.read_bytes()[:-64])
    dist.barrier()
    results["complaints"] = {name: complaint(directory / name, False) for name in ("no-state", "no-shard", "cut-shard")}
    results["complaints"]["other model"] = complaint(good, True)
    return results


def one_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Load what two workers saved, go on alone with the same global batches."""
    from safetensors.torch import load_file

    from trainer.loop import checkpoint
    from trainer.loop.engine import build_engine

    directory = Path(config["directory"])
    undisturbed = build_engine(SummedLoss(False), training(zero_stage=3, accumulation=4))
    run_steps(undisturbed, range(4))
    expected = snapshot(undisturbed)
    undisturbed.destroy()
    errors = {}
    for stage in (0, 2, 3):
        engine = build_engine(SummedLoss(False), training(zero_stage=stage, accumulation=4))
        checkpoint.load(engine, directory / "float32-3-2")
        run_steps(engine, range(2, 4))
        resumed = snapshot(engine)
        engine.destroy()
        errors[stage] = max((resumed[name] - expected[name]).abs().max().item() for name in expected)
    # and the layout itself: what one worker saves holds the same tensors as the two workers' files together
    engine = build_engine(SummedLoss(False), training(zero_stage=0, accumulation=4))
    checkpoint.load(engine, directory / "float32-3-2")
    checkpoint.save(engine, directory / "alone", {"position": 2})
    engine.destroy()
    alone = load_file(directory / "alone" / "shard-00000-of-00001.safetensors")
    both = {}
    for shard in sorted((directory / "float32-3-2").glob("*.safetensors")):
        both.update(load_file(shard))
    same = alone.keys() == both.keys() and all(torch.equal(alone[name], both[name]) for name in both)
    return {"errors": errors, "same files": same}


def launch(loop: Any, workers: int, config: dict[str, Any]) -> dict[str, Any]:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(
            name=f"engine-{workers}",
            storage_path=config["directory"],
            worker_runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu"}},
        ),
    )
    return trainer.fit().return_value


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def two(ray_cluster: Any, directory: Path) -> dict[str, Any]:
    return launch(two_workers, 2, {"directory": str(directory), "cases": CASES, "resumes": RESUMES})


@pytest.fixture(scope="module")
def one(two: dict[str, Any], directory: Path) -> dict[str, Any]:
    return launch(one_worker, 1, {"directory": str(directory)})


def test_the_cover_is_pairwise() -> None:
    values = (STAGES, ACCUMULATIONS, (False, True), ("float32", "bfloat16"))
    for (i, left), (j, right) in itertools.combinations(enumerate(values), 2):
        assert {(case[i], case[j]) for case in PAIRWISE} == set(itertools.product(left, right))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "zero{}-acc{}-lora{:d}-{}".format(*case))
def test_gradients_and_weights_equal_plain_pytorch(two: dict[str, Any], case: tuple[int, int, bool, str]) -> None:
    errors = two["compare"][case]
    stage, _, _, precision = case
    if precision == "float32":
        assert errors["gradients"] < 1e-5
        assert errors["weights"] < 1e-5
        assert errors["update"] < 1e-4
        assert errors["norm"] < 1e-5
    else:  # ZeRO 0 accumulates in bfloat16, ZeRO 3 rounds its linear layers otherwise
        assert errors["first gradient"] < (5e-3 if stage in (0, 3) else 1e-6)
        assert errors["gradients"] < (5e-2 if stage in (0, 3) else 1e-3)
        assert errors["update"] < (1e-1 if stage in (0, 3) else 1e-3)
    assert errors["replica"] == 0
    assert errors["full weights"] == 0


@pytest.mark.parametrize(("stage", "precision"), POISONED)
def test_a_gradient_that_is_not_finite_skips_the_step(two: dict[str, Any], stage: int, precision: str) -> None:
    assert two["poison"][stage, precision] == {"applied": 0.0, "changed": 0.0, "bad": 0.0}


@pytest.mark.parametrize("case", RESUMES, ids=lambda case: "{}-zero{}-to-zero{}-lora{:d}".format(*case))
def test_resuming_under_another_stage_changes_nothing(two: dict[str, Any], case: tuple[str, int, int, bool]) -> None:
    precision, source, target, _ = case
    errors = two["resume"][case]
    assert errors["state"] == errors["loaded"] == errors["module"] == errors["step count"] == 0
    if precision == "float32" or source == target:
        assert errors["resumed"] < 1e-5


def test_a_checkpoint_before_the_first_step_changes_nothing(two: dict[str, Any]) -> None:
    assert two["untouched"]["weights"] < 1e-5


def test_resuming_with_fewer_workers_changes_nothing(one: dict[str, Any]) -> None:
    assert max(one["errors"].values()) < 1e-5
    assert one["same files"]


def test_unusable_checkpoints_are_refused_with_a_reason(two: dict[str, Any]) -> None:
    complaints = two["complaints"]
    assert "state.json is missing" in complaints["no-state"]
    assert "missing or damaged" in complaints["no-shard"]
    assert "missing or damaged" in complaints["cut-shard"]
    assert "lacks trainable parameters" in complaints["other model"]
    assert "lora_A" in complaints["other model"]


def test_a_checkpoint_is_safetensors_and_json_and_names_every_tensor_once(two: dict[str, Any], directory: Path) -> None:
    from safetensors import safe_open

    path = directory / "float32-3-2"
    assert sorted(file.name for file in path.iterdir()) == [
        "shard-00000-of-00002.safetensors",
        "shard-00001-of-00002.safetensors",
        "state.json",
    ]
    document = json.loads((path / "state.json").read_text())
    shapes = {name: list(p.shape) for name, p in SummedLoss(False).named_parameters()}
    assert document["parameters"] == shapes

    def stored() -> Iterator[str]:
        for file in path.glob("*.safetensors"):
            with safe_open(file, framework="pt") as shard:
                yield from shard.keys()

    assert sorted(stored()) == sorted(f"{kind}/{n}" for kind in ("weight", "exp_avg", "exp_avg_sq") for n in shapes)
