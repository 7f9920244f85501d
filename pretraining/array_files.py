"""Files of arrays that are read in part: each array stands in one piece, behind a header of JSON."""

import json
import os
from typing import Any

import numpy as np

ALIGNMENT = 64  # bytes


def _aligned(place: int) -> int:
    return -(-place // ALIGNMENT) * ALIGNMENT


def write_arrays(path: str, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Writes a local file under another name first, so that it is whole or not there.

    Args:
      path: the file.
      arrays: one-dimensional arrays by name.
      facts: plain values that go with them.
    """
    places, place = {}, 0
    for name, values in arrays.items():
        places[name] = [values.dtype.str, len(values), place]
        place = _aligned(place + values.nbytes)
    header = json.dumps({"arrays": places, "facts": facts}).encode()
    with open(f"{path}.unfinished", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        start = _aligned(file.tell())
        for name, values in arrays.items():
            file.seek(start + places[name][2])
            file.write(np.ascontiguousarray(values).data)
        file.truncate(start + place)
    os.rename(f"{path}.unfinished", path)


def read_facts(path: str) -> dict[str, Any]:
    """Returns the plain values of a file."""
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))["facts"]


def map_arrays(path: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a file without reading them: only what is used comes to memory."""
    raw = np.memmap(path, np.uint8, "r")
    length = int.from_bytes(raw[:8].tobytes(), "little")
    places = json.loads(raw[8 : 8 + length].tobytes())["arrays"]
    start = _aligned(8 + length)
    return {
        name: np.asarray(
            raw[start + place : start + place + count * np.dtype(dtype).itemsize]
        ).view(dtype)
        for name, (dtype, count, place) in places.items()
    }
