"""What a large catalogue costs: to spell, to build its trie, to hold, to load, and to add items to.

    python -m benchmarks.trie                            # 17k, 100k and 1M simulated titles
    python -m benchmarks.trie --items 10000000           # if there are 15 GB to spare

Titles are made of the words of `benchmarks.catalogues`, so that they part as real ones do, and are spelled by a
byte-level BPE tokenizer trained on some of them. Each size is measured in a process of its own. Seconds are its own CPU
seconds; memory is what the process grew by at its peak, once it held the titles.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.catalogues import random_titles
from recommender.backbone.backbone import train_tokenizer
from recommender.config import IdentifierConfig
from recommender.items.identifiers import spell_titles
from recommender.items.trie import RadixTrie

Result = TypeVar("Result")
ADDED = 1_000  # items


def titles_of(items: int) -> list[str]:
    """Distinct titles of three to seven words out of some 30,000."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(rng.choice(syllables, 3)).capitalize() for _ in range(32_000)]
    titles = [" ".join(words[token] for token in spelled[:-1]) for spelled in random_titles(items, 32_000, rng)]
    return [titles[at] for at in rng.permutation(items)]


def measure(file: Path) -> dict[str, Any]:
    """Seconds by step, and what things weigh, for a file with a title a line."""
    titles = file.read_text().splitlines()
    titles, further = titles[:-ADDED], titles[-ADDED:]
    tokenizer = train_tokenizer(titles[:20_000], 8_000)
    config = IdentifierConfig(max_tokens=16)
    before = _peak_mib()
    seconds: dict[str, float] = {}

    def timed(step: str, function: Callable[[], Result]) -> Result:
        started = time.process_time()
        result = function()
        seconds[step] = time.process_time() - started
        return result

    spelled = timed("spell", lambda: spell_titles(titles, tokenizer, config))
    trie = timed("build", lambda: RadixTrie.build(spelled.tokens, spelled.offsets))
    peak = _peak_mib() - before
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trie.safetensors"
        trie.save(path)
        size = path.stat().st_size
        loaded = timed("load", lambda: RadixTrie.load(path))
        timed("to tensors", lambda: loaded.to("cpu"))
        new = timed("spell new", lambda: spell_titles(further, tokenizer, config, loaded))
        timed("add", lambda: loaded.extended(new.tokens, new.offsets))
    return {
        "items": len(titles),
        "tokens": len(spelled.tokens),
        "nodes": trie.nodes,
        "seconds": seconds,
        "file_mib": size / 2**20,
        "peak_mib": peak,
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(items: int) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(titles_of(items + ADDED)))
        file.flush()
        command = [sys.executable, "-m", "benchmarks.trie", "--titles", file.name]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trie", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, nargs="+", default=[17_000, 100_000, 1_000_000])
    parser.add_argument("--titles", type=Path, help="a file with a title a line, in place of simulated ones")
    args = parser.parse_args()
    if args.titles:
        print(json.dumps(measure(args.titles)))
        return
    found = [in_a_process(items) for items in args.items]
    table = Table("items", "tokens", "nodes", *(f"{step}, s" for step in found[0]["seconds"]), "file, MiB", "peak, MiB")
    for each in found:
        seconds = [f"{value:.2f}" for value in each["seconds"].values()]
        sizes = [f"{each['file_mib']:.0f}", f"{each['peak_mib']:.0f}"]
        table.add_row(*(f"{each[name]:,}" for name in ("items", "tokens", "nodes")), *seconds, *sizes)
    Console(width=140).print(table)
    print(f"new: {ADDED:,} further items. Peak: of spelling and building, over a process that holds the titles.")


if __name__ == "__main__":
    main()
