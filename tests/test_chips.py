"""What is known of each chip, and which names find it."""

import dataclasses

import pytest

from jaxft import chips

KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", "TPU7x": "tpu7x", "NVIDIA H200": "H200", "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA A100-SXM4-80GB": "A100-80GB", "NVIDIA A100-SXM4-40GB": "A100-40GB", "NVIDIA L4": "L4", "Tesla T4": "T4",
    "NVIDIA GeForce RTX 4090": "RTX-4090",
}  # fmt: skip
UNKNOWN = ("cpu", "", "TPU v9", "TPU v5 lite 2", "NVIDIA H100 PCIe", "NVIDIA H200 MIG 1g.18gb", "AMD Instinct MI300X")


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_kind_finds_its_chip(kind):
    assert chips.of_device(kind).name == KINDS[kind]


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_device_that_is_not_listed_is_not_guessed(kind):
    assert chips.of_device(kind) is None


def test_no_name_stands_for_two_chips():
    kinds = [kind for chip in chips.CHIPS for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))
    assert [chips.named(chip.name) for chip in chips.CHIPS] == list(chips.CHIPS) and chips.named("v9") is None


@pytest.mark.parametrize("chip", chips.CHIPS, ids=lambda chip: chip.name)
def test_every_figure_has_its_unit_and_its_source(chip):
    assert chip.source and chip.hbm_source and chip.date
    assert 0.7 * chip.memory_bytes < chip.hbm_bytes < chip.memory_bytes  # a little less, or JAX's share of a GPU
    assert 10 * chips.GIB < chip.memory_bytes < 200 * chips.GIB
    assert chip.flops is None or 1e14 < chip.flops < 1e16
    assert 1e11 < chip.hbm_bytes_per_second < 1e13
    assert (chip.usd_per_chip_hour is None) == (chip.price_source is None)
    if chip.usd_per_chip_hour_spot is not None:
        assert chip.usd_per_chip_hour_spot < chip.usd_per_chip_hour
    with pytest.raises(dataclasses.FrozenInstanceError):
        chip.flops = 1.0
