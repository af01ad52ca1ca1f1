"""Event files, read as TensorBoard reads them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog


def points(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every curve. A session that starts at a step hides what was written before of that and later
    steps."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(directory.glob("events.out.tfevents.*")):
        for event in _events(path):
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                curves = {name: [p for p in curve if p[0] < event.step] for name, curve in curves.items()}
            for value in event.summary.value:
                curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    return curves


def _events(path: Path) -> Iterator[Any]:
    """Records of: length (8 bytes), its checksum (4), an event, its checksum (4)."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += length + 16
