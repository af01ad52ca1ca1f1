"""The DeepSpeed engine: from a module that returns its loss to sharded optimiser steps under ZeRO 0, 1, 2 or 3.

DeepSpeed is imported inside the functions: the driver, which never trains, does not pay for it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.config import TrainingConfig

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def build_engine(module: nn.Module, training: TrainingConfig) -> DeepSpeedEngine:
    """Wrap `module` for data-parallel training over the default process group, which exists already. Collective.

    The loop runs `loss = engine(batch); engine.backward(loss); engine.step()` for every micro-batch; DeepSpeed counts
    them, and each `training.accumulation`-th `step` updates the weights, whereupon `engine.was_step_applied()` is true,
    or false if the gradient was not finite: then weights and moments stay as they were. The gradient's norm before
    clipping is `engine.get_global_grad_norm()`.

    DeepSpeed divides losses by the accumulation and gradients by the number of ranks. A loss of
    `Σ_local / D · loss_scale(engine)`, with D the denominator of the whole optimiser step, undoes both: the gradient is
    that of Σ_global / D.

    Under ZeRO 2 and 3 gradients are reduced while they appear, so the i-th micro-batch must use the same trainable
    parameters on every rank (one that no rank uses is fine): where a rank has nothing to do with a parameter, let it
    add `0 * parameter.sum()` to its loss. Ranks that differ crash, hang, or mix up gradients.

    Args:
        module: `forward(batch)` returns a scalar loss. Parameters that need no gradient stay as they are (LoRA); rank
            0's weights are everyone's. Under bfloat16 all its parameters become bfloat16; the trainable ones have
            float32 masters in the optimiser.
        training: ZeRO stage, precision, accumulation, clipping, and AdamW's settings. Norms, biases and all further
            vectors are not decayed. The learning rate is 0 until `set_learning_rate`.
    """
    import deepspeed

    # An extension for inference on CPUs, which DeepSpeed would compile for half a minute on a machine's first run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.dim() > 1]
    vectors = [parameter for parameter in trainable if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    bare = training.zero_stage == 0 and training.precision == "float32"
    optimizer: torch.optim.AdamW
    if bare:
        optimizer = _ClippingAdamW(groups, training.gradient_clipping, lr=0.0, betas=training.betas)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=training.betas)

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # of use for its own statistics only
        "gradient_accumulation_steps": training.accumulation,
        "gradient_clipping": 0.0 if bare else training.gradient_clipping,
        "zero_optimization": {"stage": training.zero_stage},
        "steps_per_print": None,
    }
    if training.precision == "bfloat16":
        config["bf16"] = {"enabled": True}
        config["communication_data_type"] = "fp32"
        if training.zero_stage > 0:  # stage 0 can only accumulate in the parameters' own dtype
            config["data_types"] = {"grad_accum_dtype": "fp32"}

    with redirect_stdout(io.StringIO()):  # its bfloat16 optimiser prints memory figures at every log level
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    _reset_moments(engine)
    return engine


def masters(engine: DeepSpeedEngine) -> list[Tensor]:
    """The float32 tensors that AdamW updates on this rank: flat partitions, or under ZeRO 0 whole parameters."""
    if engine.zero_optimization_partition_weights():
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [master for group in engine.basic_optimizer.param_groups for master in group["params"]]


def _reset_moments(engine: DeepSpeedEngine) -> None:
    """Give AdamW zero moments at step 0, which it would otherwise create in its first step.

    Checkpoints need them from the start, and two faults of DeepSpeed (0.19) are out of the way. Under ZeRO 0 in
    bfloat16 it has just taken a step on zero gradients; the learning rate of 0 kept that from decaying the weights,
    here the step count goes back to 0. Under ZeRO 1 and 2 it links parameters to moments after the first *group* has
    stepped, so that those of further groups could never be read.
    """
    state = engine.basic_optimizer.state
    for master in masters(engine):
        state[master] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(master, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(master, memory_format=torch.preserve_format),
        }
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


class _ClippingAdamW(torch.optim.AdamW):
    """AdamW that clips and skips as DeepSpeed's own optimisers do; DeepSpeed leaves ZeRO 0 in float32 to the user's.

    The engine reads the two attributes that `step` sets.
    """

    def __init__(self, groups: list[dict[str, Any]], largest_norm: float, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.largest_norm = largest_norm

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._global_grad_norm = norm.item()
        self.overflow = not norm.isfinite().item()
        if self.overflow:
            return
        if self.largest_norm > 0:
            torch._foreach_mul_(gradients, (self.largest_norm / (norm + 1e-6)).clamp(max=1.0))
        super().step()


def loss_scale(engine: DeepSpeedEngine) -> int:
    """What undoes DeepSpeed's division of losses by the accumulation and of gradients by the number of ranks."""
    return engine.gradient_accumulation_steps() * engine.dp_world_size


def set_learning_rate(engine: DeepSpeedEngine, learning_rate: float) -> None:
    """Set the learning rate of the next optimiser steps."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def full_weights(engine: DeepSpeedEngine, trainable_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter's name in the module and its whole value. Collective: every rank must exhaust it.

    Parameters come one by one in the module's order, tied ones once, each as a copy on the CPU in the dtype that the
    module computes in; no rank ever holds more than one sharded parameter in whole.
    """
    from deepspeed.runtime.zero import GatheredParameters

    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad or not trainable_only:
            with GatheredParameters([parameter], enabled=engine.zero_optimization_partition_weights()):
                value = parameter.detach().to("cpu", copy=True)
            yield name, value


@torch.no_grad()
def copy_weights(engine: DeepSpeedEngine, replica: nn.Module) -> None:
    """Copy all weights into `replica`, a module of the same structure, which each rank may then use alone: search,
    for example, runs a different number of forwards on every rank, and would hang on sharded modules. Collective."""
    for name, value in full_weights(engine):
        replica.get_parameter(name).copy_(value)
