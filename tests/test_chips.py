"""The table of slices: against Google's names, and against libtpu's own idea of each topology."""

import importlib.util

import pytest

from tpu.chips import CHIPS, parse_slice

needs_compiler = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("jax", "libtpu")),
    reason="the extra `preflight` is not installed",
)
EVERY_SLICE = [
    f"{chip.accelerator_prefix}-{size}" for chip in CHIPS.values() for size in sorted(chip.sizes)
]


@pytest.mark.parametrize(
    ("name", "topology", "chips", "devices", "hosts", "gib"),
    [
        ("v2-8", "v2:2x2", 4, 8, 1, 8),
        ("v2-512", "v2:16x16", 256, 512, 64, 8),
        ("v3-8", "v3:2x2", 4, 8, 1, 16),
        ("v3-32", "v3:4x4", 16, 32, 4, 16),
        ("v3-2048", "v3:32x32", 1024, 2048, 256, 16),
        ("v4-8", "v4:2x2x1", 4, 4, 1, 32),
        ("v4-512", "v4:4x8x8", 256, 256, 64, 32),
        ("v5litepod-1", "v5e:1x1", 1, 1, 1, 16),
        ("v5litepod-8", "v5e:2x4", 8, 8, 1, 16),
        ("v5litepod-16", "v5e:4x4", 16, 16, 4, 16),
        ("v5litepod-256", "v5e:16x16", 256, 256, 64, 16),
        ("v5p-8", "v5p:2x2x1", 4, 4, 1, 95),
        ("v5p-12288", "v5p:16x16x24", 6144, 6144, 1536, 95),
        ("v6e-8", "v6e:2x4", 8, 8, 1, 32),
        ("v6e-256", "v6e:16x16", 256, 256, 64, 32),
    ],
)
def test_googles_names(name, topology, chips, devices, hosts, gib):
    found = parse_slice(name)
    assert found.name == name
    assert found.compiler_topology == topology
    assert (found.num_chips, found.num_devices, found.num_hosts) == (chips, devices, hosts)
    assert found.hbm_bytes == gib * 2**30


def test_short_and_untidy_names():
    assert parse_slice("v5e-256") == parse_slice("v5litepod-256")
    assert parse_slice(" V3-8 ") == parse_slice("v3-8")
    assert {parse_slice("v3-8"): 1}  # hashable


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_the_number_in_a_name_counts_what_google_says(chip):
    for size in chip.sizes:
        found = parse_slice(f"{chip.accelerator_prefix}-{size}")
        assert found.num_chips * (2 if chip.counts_cores else 1) == size
        assert len(found.topology) == (3 if chip.name in ("v4", "v5p") else 2)


@pytest.mark.parametrize("name", ["", "v3", "v3-", "v9-8", "v5-8", "tpu", "v3-8-8", "v3-08", "8"])
def test_what_is_no_slice_names_the_generations(name):
    with pytest.raises(ValueError, match="v2-512, v3-2048, v4-8192, v5litepod-256") as raised:
        parse_slice(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("v3-9", "cores.*8, 32, 64, 128, 256, 512, 1024, 2048"),
        ("v5e-2", r"v5litepod-N.*chips.*1, 4, 8, 16, 32, 64, 128, 256"),
    ],
)
def test_a_size_that_does_not_exist_lists_those_that_do(name, sizes):
    with pytest.raises(ValueError, match=sizes):
        parse_slice(name)


def test_links_that_lead_nowhere_carry_nothing():
    per_chip = CHIPS["v3"].ici_bandwidth
    assert parse_slice("v3-2048").used_ici_bandwidth == per_chip  # both dimensions are rings
    assert parse_slice("v3-8").used_ici_bandwidth == per_chip / 2
    assert parse_slice("v4-8").used_ici_bandwidth == CHIPS["v4"].ici_bandwidth / 3
    assert parse_slice("v5e-1").used_ici_bandwidth == 0


@needs_compiler
def test_libtpu_knows_every_slice_and_counts_its_devices_alike():
    from tpu.compiler import topology_devices

    counted = {name: topology_devices(parse_slice(name)) for name in EVERY_SLICE}
    assert counted == {name: parse_slice(name).num_devices for name in EVERY_SLICE}
