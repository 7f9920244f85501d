"""TPU chips and the slices that Google rents out, by their names: the table behind preflight and plan."""

import dataclasses
import math
import re
from collections.abc import Mapping

GIB = 2**30

_DOCS = "https://cloud.google.com/tpu/docs"
# Jouppi et al., "A Domain-Specific Supercomputer for Training Deep Neural Networks", CACM 2020.
_CACM_2020 = "https://doi.org/10.1145/3360307"
# Jouppi et al., "TPU v4: An Optically Reconfigurable Supercomputer ...", ISCA 2023.
_ISCA_2023 = "https://arxiv.org/abs/2304.01433"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One generation of TPU chips.

    Attributes:
      name: such as "v3".
      devices: what TensorFlow sees of one chip. Both cores of a v2 or v3 are devices of their own;
        the two cores of a v4 or v5p work as one ("megacore").
      counts_cores: whether N in the name of a slice counts cores, two a chip, or else chips.
      hbm_bytes: memory of a device.
      peak_flops: bfloat16 matrix products of a chip, FLOP/s.
      flops_per_cycle: of bfloat16 matrix products in a clock cycle of a chip: 2 x 128 x 128 of each of
        its matrix units, 2 x 256 x 256 on v6e.
      hbm_bandwidth: between a chip and its memory, bytes/s.
      ici_bandwidth: what a chip sends to its neighbours over all of its links together, bytes/s; it
        receives as much at the same time.
      chips_per_host: chips of one machine (TPU VM) in a slice of several machines.
      chips_of_one_host: the largest slice that one machine holds, chips.
      sizes: topology in chips of every slice, by the number in its name.
      sources: where the figures come from.
    """

    name: str
    devices: int
    counts_cores: bool
    hbm_bytes: int
    peak_flops: float
    flops_per_cycle: int
    hbm_bandwidth: float
    ici_bandwidth: float
    chips_per_host: int
    chips_of_one_host: int
    sizes: Mapping[int, tuple[int, ...]] = dataclasses.field(repr=False, hash=False)
    sources: tuple[str, ...] = dataclasses.field(repr=False)

    @property
    def clock(self) -> float:
        """Clock cycles a second, as the peak implies."""
        return self.peak_flops / self.flops_per_cycle

    @property
    def accelerator_prefix(self) -> str:
        """What precedes the number in Google's name of a slice, such as "v5litepod"."""
        return _PREFIXES.get(self.name, self.name)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Some chips of a pod, rented as one.

    Attributes:
      name: Google's accelerator type, such as "v3-2048".
      chip: its generation.
      topology: chips along each dimension of the network.
    """

    name: str
    chip: Chip
    topology: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        """Chips of the slice, by which it is paid."""
        return math.prod(self.topology)

    @property
    def num_devices(self) -> int:
        """Replicas of a run on this slice."""
        return self.num_chips * self.chip.devices

    @property
    def num_hosts(self) -> int:
        """Machines (TPU VMs) of the slice."""
        if self.num_chips <= self.chip.chips_of_one_host:
            return 1
        return self.num_chips // self.chip.chips_per_host

    @property
    def hbm_bytes(self) -> int:
        """Memory of a device."""
        return self.chip.hbm_bytes

    @property
    def compiler_topology(self) -> str:
        """The topology as libtpu's compiler spells it, such as "v3:32x32"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.topology))}"

    @property
    def chip_config(self) -> str:
        """The compiler's configuration of a chip, "" for its default."""
        return "megacore" if self.chip.counts_cores and self.chip.devices == 1 else ""

    @property
    def used_ici_bandwidth(self) -> float:
        """What a chip sends over those links that lead to other chips of the slice, bytes/s.

        A dimension of two chips uses one link of its two, a dimension of one chip none; a longer one
        is taken to be a ring, which makes this an upper limit where it is not.
        """
        links = sum(min(chips - 1, 2) for chips in self.topology)
        return self.chip.ici_bandwidth * links / (2 * len(self.topology))


_V2_SIZES: Mapping[int, tuple[int, ...]] = {
    8: (2, 2),
    32: (4, 4),
    128: (8, 8),
    256: (8, 16),
    512: (16, 16),
}
_V3_SIZES: Mapping[int, tuple[int, ...]] = {**_V2_SIZES, 64: (4, 8), 1024: (16, 32), 2048: (32, 32)}
# Up to 64 chips a part of a cube of 4x4x4, from there on whole cubes, as near to a cube as can be.
_V5P_SIZES: Mapping[int, tuple[int, ...]] = {
    8: (2, 2, 1),
    16: (2, 2, 2),
    32: (2, 2, 4),
    64: (2, 4, 4),
    128: (4, 4, 4),
    256: (4, 4, 8),
    384: (4, 4, 12),
    512: (4, 8, 8),
    1024: (8, 8, 8),
    1536: (8, 8, 12),
    2048: (8, 8, 16),
    3072: (8, 12, 16),
    4096: (8, 16, 16),
    6144: (12, 16, 16),
    8192: (16, 16, 16),
    12288: (16, 16, 24),
}
_V4_SIZES = {size: shape for size, shape in _V5P_SIZES.items() if size <= 8192}
_V5E_SIZES: Mapping[int, tuple[int, ...]] = {
    1: (1, 1),
    4: (2, 2),
    8: (2, 4),
    16: (4, 4),
    32: (4, 8),
    64: (8, 8),
    128: (8, 16),
    256: (16, 16),
}
_PREFIXES = {"v5e": "v5litepod"}
_GENERATIONS = {"v5litepod": "v5e"}

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v2",
            devices=2,
            counts_cores=True,
            hbm_bytes=8 * GIB,
            peak_flops=46e12,
            flops_per_cycle=2 * 2 * 128**2,
            hbm_bandwidth=700e9,
            ici_bandwidth=4 * 62e9,  # four links of 496 Gbit/s
            chips_per_host=4,
            chips_of_one_host=4,
            sizes=_V2_SIZES,
            sources=(f"{_DOCS}/v2 (sizes)", f"{_CACM_2020} (all others, from memory)"),
        ),
        Chip(
            name="v3",
            devices=2,
            counts_cores=True,
            hbm_bytes=16 * GIB,
            peak_flops=123e12,
            flops_per_cycle=4 * 2 * 128**2,
            hbm_bandwidth=900e9,
            ici_bandwidth=340e12 / 1024,  # all-reduce bandwidth of the pod
            chips_per_host=4,
            chips_of_one_host=4,
            sizes=_V3_SIZES,
            sources=(f"{_DOCS}/v3", "the paper's table 1 (64 cores, no longer rented out)"),
        ),
        Chip(
            name="v4",
            devices=1,
            counts_cores=True,
            hbm_bytes=32 * GIB,
            peak_flops=275e12,
            flops_per_cycle=8 * 2 * 128**2,
            hbm_bandwidth=1200e9,
            ici_bandwidth=1.1e15 / 4096,  # all-reduce bandwidth of the pod
            chips_per_host=4,
            chips_of_one_host=4,
            sizes=_V4_SIZES,
            sources=(f"{_DOCS}/v4", f"{_ISCA_2023} (six links of 50 GB/s, from memory)"),
        ),
        Chip(
            name="v5e",
            devices=1,
            counts_cores=False,
            hbm_bytes=16 * GIB,
            peak_flops=197e12,
            flops_per_cycle=4 * 2 * 128**2,
            hbm_bandwidth=819e9,
            ici_bandwidth=200e9,  # 1600 Gbit/s; "bidirectional 400 GBps"
            chips_per_host=4,
            chips_of_one_host=8,
            sizes=_V5E_SIZES,
            sources=(f"{_DOCS}/v5e",),
        ),
        Chip(
            name="v5p",
            devices=1,
            counts_cores=True,
            hbm_bytes=95 * GIB,
            peak_flops=459e12,
            flops_per_cycle=8 * 2 * 128**2,
            hbm_bandwidth=2765e9,
            ici_bandwidth=600e9,  # 4800 Gbit/s; "bidirectional 1200 GBps"
            chips_per_host=4,
            chips_of_one_host=4,
            sizes=_V5P_SIZES,
            sources=(f"{_DOCS}/v5p",),
        ),
        Chip(
            name="v6e",
            devices=1,
            counts_cores=False,
            hbm_bytes=32 * GIB,
            peak_flops=918e12,
            flops_per_cycle=4 * 2 * 256**2,
            hbm_bandwidth=1600e9,
            ici_bandwidth=400e9,  # 3200 Gbit/s; "bidirectional 800 GBps"
            chips_per_host=4,
            chips_of_one_host=8,
            sizes=_V5E_SIZES,
            sources=(f"{_DOCS}/v6e",),
        ),
    )
}


def parse_slice(name: str) -> Slice:
    """Returns the slice of Google's accelerator type, in its default topology.

    Args:
      name: such as "v3-2048", "v5litepod-256" or its short form "v5e-256". The number counts cores
        for v2, v3, v4 and v5p, chips for the others.

    Raises:
      ValueError: there is no such slice; one line that says which there are.
    """
    match = re.fullmatch(r"(v\w+)-([1-9]\d*)", name.strip().lower())
    generation = _GENERATIONS.get(match[1], match[1]) if match else ""
    if match is None or generation not in CHIPS:
        examples = ", ".join(f"{c.accelerator_prefix}-{max(c.sizes)}" for c in CHIPS.values())
        raise ValueError(
            f"{name!r} is no slice of TPUs: expected a generation and a size; the largest of each "
            f"generation are {examples}"
        )
    chip, size = CHIPS[generation], int(match[2])
    if size not in chip.sizes:
        unit = "cores" if chip.counts_cores else "chips"
        raise ValueError(
            f"{name!r} is no slice of TPU {chip.name}: expected {chip.accelerator_prefix}-N with N "
            f"({unit}) one of {', '.join(map(str, sorted(chip.sizes)))}"
        )
    return Slice(f"{chip.accelerator_prefix}-{size}", chip, chip.sizes[size])
