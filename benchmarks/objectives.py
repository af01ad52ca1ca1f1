"""What an objective costs: step time, peak memory and tokens a second beside the bound that its FLOPs set.

    python -m benchmarks.objectives                                         # a CPU, scaled-down shape; ten minutes
    python -m benchmarks.objectives --device cuda --dtype bfloat16 --hidden 2048 --layers 16 --users 400

All contenders do a forward and backward pass on the same users and targets, in the same process, in turns; on a CPU,
seconds are the process's own CPU seconds, since other processes come and go. Memory is measured in a process of its own
that gives freed memory back at once. "naive" computes all logits of all layers of the batch at once and masks them, as
released code does. The bound of a contender is LML's time scaled by matrix-product FLOPs, so `x bound` = 1.00 means
that nothing but matrix products costs anything more than it costs LML.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.catalogues import random_titles
from objectives import losses
from objectives.config import ILRecConfig, LMLConfig, MSLConfig, ObjectiveConfig, needs_rewards
from objectives.objective import Predictions, build_objective
from objectives.rewards import Histories, RewardSource
from recommender.backbone.backbone import Backbone
from recommender.backbone.tree import Batch, Row, Sample, build_row, collate
from recommender.collaborative.config import SASRecConfig
from recommender.collaborative.sasrec import SASRec
from recommender.items.trie import RadixTrie
from trainer.loop.module import MicroBatch, TrainedModel

CONTENDERS: dict[str, ObjectiveConfig] = {
    "LML": LMLConfig(),
    "MSL": MSLConfig(),
    "MSL + ATS": MSLConfig(temperature="adaptive"),
    "ILRec": ILRecConfig(),
    "ILRec k=3": ILRecConfig(k=3),
    "ILRec + CRR": ILRecConfig(crr_weight=0.01),
    "ILRec, masked": ILRecConfig(vocabulary="valid"),
    "ILRec + CRR, masked": ILRecConfig(vocabulary="valid", crr_weight=0.01),
}
NAIVE = ("LML", "MSL", "ILRec", "ILRec k=3")


@dataclass(frozen=True)
class Sequence:
    """A row and what its samples have seen: see `objectives.rewards.Histories`."""

    row: Row
    items: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Work:
    """The same targets as tree rows and as plain rows, and the catalogue's trie."""

    trie: RadixTrie
    tree: list[Sequence]
    plain: list[Sequence]


def make_work(users: int, items: int, vocabulary: int, history: int, seed: int = 0) -> Work:
    """Random users over a random catalogue whose titles part as real ones do: many first words, few ways on."""
    rng = np.random.default_rng(seed)
    spelled = random_titles(items, vocabulary, rng)
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in spelled])])
    tokens = np.concatenate(spelled)
    trie = RadixTrie.build(tokens, offsets)
    nodes = trie.prediction_nodes()
    end = np.array([1], np.int32)
    tree: list[Sequence] = []
    plain: list[Sequence] = []
    for _ in range(users):
        seen = rng.integers(0, items, history + 1)
        samples = [
            Sample(
                np.concatenate([end, *(spelled[item] for item in seen[:length])]).astype(np.int32),
                spelled[seen[length]],
                nodes[offsets[seen[length]] : offsets[seen[length] + 1]],
            )
            for length in range(history // 2, history + 1)
        ]
        lengths = np.arange(history // 2, history + 1)
        tree.append(Sequence(build_row(samples), seen, lengths))
        plain += [Sequence(build_row([one]), seen, lengths[i : i + 1]) for i, one in enumerate(samples)]
    return Work(trie, tree, plain)


def make_backbone(args: argparse.Namespace, vocabulary: int) -> Backbone:
    """A Llama of the shape asked for, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(args.hidden // 64, 1),
        num_key_value_heads=max(args.hidden // 64, 1),
        intermediate_size=int(args.hidden * 2.75),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    with torch.device(args.device):
        model = LlamaForCausalLM(config).to(getattr(torch, args.dtype))
    return Backbone(model.train(), tokenizer)


@dataclass
class Contender:
    """One way to compute an objective on one kind of rows."""

    name: str
    rows: str
    step: Callable[[], float]
    flops: float
    tokens: int
    seconds: list[float]
    memory: float = 0.0


def contenders(args: argparse.Namespace, backbone: Backbone, work: Work) -> list[Contender]:
    """Every objective on both kinds of rows, and the naive forms on tree rows. A step makes its batches too."""
    torch.manual_seed(0)
    collaborative = SASRec(SASRecConfig(), len(work.trie)).to(backbone.device)
    made = []
    for rows_name, rows in (("tree", work.tree), ("plain", work.plain)):
        parts = _parts(rows, args.batch_tokens)
        for name, config in CONTENDERS.items():
            objective = build_objective(config, backbone.num_layers, work.trie)
            rewards = RewardSource(collaborative, work.trie, None) if needs_rewards(config) else None
            module = TrainedModel(backbone, objective, work.trie, 0.0, rewards, args.logits_memory_mb)
            batches = [_micro_batch(module, part) for part in parts]
            flops = sum(model_flops(backbone, each.batch) + head_flops(backbone, config, each) for each in batches)
            tokens = sum(each.batch.tokens for each in batches)
            ours = _stepper(backbone, parts, partial(our_loss, module))
            made.append(Contender(name, rows_name, ours, flops, tokens, []))
            if name in NAIVE and rows_name == "tree":
                naive = _stepper(backbone, parts, partial(naive_loss, module, work.trie))
                made.append(Contender(f"{name}, naive", rows_name, naive, flops, tokens, []))
    return made


def _parts(rows: list[Sequence], batch_tokens: int) -> list[list[Sequence]]:
    parts: list[list[Sequence]] = [[]]
    for each in sorted(rows, key=lambda sequence: len(sequence.row)):
        if parts[-1] and len(each.row) * (len(parts[-1]) + 1) > batch_tokens:
            parts.append([])
        parts[-1].append(each)
    return parts


def _micro_batch(module: TrainedModel, part: list[Sequence]) -> MicroBatch:
    batch = collate([each.row for each in part], 0, module.objective.branching_only)
    histories = Histories(
        [each.items for each in part], [each.lengths for each in part], [each.items[each.lengths] for each in part]
    )
    return module.micro_batch(batch, histories)


def _stepper(
    backbone: Backbone, parts: list[list[Sequence]], loss_of: Callable[[list[Sequence]], Tensor]
) -> Callable[[], float]:
    def step() -> float:
        total = 0.0
        for part in parts:
            loss = loss_of(part)
            loss.backward()
            total += loss.item()
        backbone.model.zero_grad()
        return total

    return step


def our_loss(module: TrainedModel, part: list[Sequence]) -> Tensor:
    """The loss as training computes it."""
    return module(_micro_batch(module, part))


def naive_loss(module: TrainedModel, trie: RadixTrie, part: list[Sequence]) -> Tensor:
    """The same loss by plain autograd: logits of every layer for the whole batch at once, masks [P, V]."""
    backbone, objective = module.backbone, module.objective
    batch = collate([each.row for each in part], 0, objective.branching_only).to(backbone.device)
    with backbone.tapped(objective.layers) as taps:
        hidden = backbone.hidden(batch.input_ids, batch.attention_mask(), batch.position_ids)
    states = [hidden, *(backbone.norm(taps[layer]) for layer in objective.layers)]
    logits = [backbone.logits(state.flatten(0, 1)[batch.source]).float() for state in states]
    if objective.valid_only:
        invalid = ~valid_mask(trie, batch, backbone.vocabulary)
        logits = [each.masked_fill(invalid, -torch.inf) for each in logits]
        return losses.masked_softmax(logits[0], batch.target, objective.temperature).sum()
    return objective.losses(Predictions(logits[0], logits[1:], batch.target, batch.nodes))["loss"].sum()


def valid_mask(trie: RadixTrie, batch: Batch, vocabulary: int) -> Tensor:
    """bool [P, V], True for the children of each prediction's node."""
    nodes = batch.nodes.cpu().numpy()
    count = trie.child_count[nodes]
    row = np.repeat(np.arange(len(nodes)), count)
    child = trie.first_child[nodes][row] + np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    mask = torch.zeros(len(nodes), vocabulary, dtype=torch.bool)
    mask[torch.from_numpy(row), torch.from_numpy(trie.first_token[child]).long()] = True
    return mask.to(batch.target.device)


def model_flops(backbone: Backbone, batch: Batch) -> float:
    """Forward and backward through the decoder, padding included: 6 a weight and token, 12 · L² · D for attention."""
    weights = sum(p.numel() for layer in backbone.layers for p in layer.parameters())
    rows, length = batch.input_ids.shape
    width = backbone.model.config.hidden_size
    return 6.0 * weights * rows * length + 12.0 * len(backbone.layers) * rows * length**2 * width


def head_flops(backbone: Backbone, config: ObjectiveConfig, micro_batch: MicroBatch) -> float:
    """The prediction layer: 6 · D a logit that takes a gradient (forward, to the state, to the weight), else 2 · D."""
    vocabulary, width = backbone.vocabulary, backbone.model.config.hidden_size
    logits = 0.0
    for block in micro_batch.blocks:
        if block.valid is not None:
            logits += float(block.valid.sum())
        else:
            logits += len(block.at) * (vocabulary if block.tokens is None else block.tokens.shape[-1])
    a_logit = 6.0
    if isinstance(config, ILRecConfig):
        a_logit += (config.k or 1) * (6.0 if config.cpd_weight else 2.0)
    return logits * a_logit * width


def measure_time(made: list[Contender], repeats: int, device: str) -> None:
    """`repeats` rounds of timed steps in turns, after one that is not timed."""
    for number in range(repeats + 1):
        for contender in made:
            started = _now(device)
            contender.step()
            if number:
                contender.seconds.append(_now(device) - started)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure_memory(made: list[Contender], device: str, vocabulary: int) -> None:
    """Peak memory of a step of each; on a CPU in another process."""
    if device == "cuda":
        found = [peak_memory(contender.step, device) for contender in made]
    else:
        command = [sys.executable, "-m", "benchmarks.objectives", *sys.argv[1:], "--only-memory-of", str(vocabulary)]
        child = subprocess.run(command, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, capture_output=True)
        child.check_returncode()
        found = json.loads(child.stdout.splitlines()[-1])
    for contender, memory in zip(made, found, strict=True):
        contender.memory = memory


def peak_memory(step: Callable[[], float], device: str) -> float:
    """MiB that a step needs above what is held before it: on CUDA as allocated, else as resident (Linux)."""
    step()
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    step()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def table(made: list[Contender], vocabulary: int) -> Table:
    """One row a contender; ratios to LML on the same kind of rows."""
    result = Table(
        "rows", "objective", "step ms min/median/max", "x LML", "FLOPs x LML", "x bound", "peak MiB", "x LML",
        "tokens/s", title=f"V = {vocabulary:,}",
    )  # fmt: skip
    base = {c.rows: c for c in made if c.name == "LML"}
    for contender in made:
        lml = base[contender.rows]
        low, median, high = (1e3 * f(contender.seconds) for f in (min, np.median, max))
        ratio = float(np.median(np.array(contender.seconds) / np.array(lml.seconds)))
        flops = contender.flops / lml.flops
        result.add_row(
            contender.rows, contender.name, f"{low:.0f}/{median:.0f}/{high:.0f}", f"{ratio:.2f}", f"{flops:.2f}",
            f"{ratio / flops:.2f}", f"{contender.memory:.0f}", f"{contender.memory / lml.memory:.2f}",
            f"{contender.tokens / np.median(contender.seconds):,.0f}",
        )  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 128_000, 152_000])
    parser.add_argument("--items", type=int, default=2_400)
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--history", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="of a forward; steps take several")
    parser.add_argument("--logits-memory-mb", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only-memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only_memory_of:
        work = make_work(args.users, args.items, args.only_memory_of, args.history)
        made = contenders(args, make_backbone(args, args.only_memory_of), work)
        print(json.dumps([peak_memory(contender.step, args.device) for contender in made]))
        return
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.processor() or platform.machine()}"
    console = Console(width=140)
    console.print(
        f"{device}, {args.threads} threads, {args.dtype}; hidden {args.hidden}, {args.layers} layers; {args.users} "
        f"users x {args.history // 2 + 1} targets, {args.items} items; medians over {args.repeats} rounds in turns"
    )
    for vocabulary in args.vocabulary:
        work = make_work(args.users, args.items, vocabulary, args.history)
        made = contenders(args, make_backbone(args, vocabulary), work)
        measure_memory(made, args.device, vocabulary)
        measure_time(made, args.repeats, args.device)
        console.print(table(made, vocabulary))


if __name__ == "__main__":
    main()
