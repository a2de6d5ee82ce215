"""Chips as data: memory, peak rates and prices, each with its source. No JAX here."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
# Three limits on what a program may use of a chip's memory.
COMPILER = "libtpu 0.0.52, which refuses a program that needs more"
MEGACORE = "XLA's message on a v4-32, https://github.com/erfanzar/EasyDeL/issues/166"
JAX_SHARE = "three quarters, which JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise"
CATALOGUE = (
    "Google's list and spot prices in us-central1, as collected in https://github.com/skypilot-org/skypilot-catalog "
    "(catalogs/v8/gcp/vms.csv at 006059e)"
)


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator, under its maker's name; None is what no source told.

    Memory and rates are those of one JAX device. That is a whole chip; on TPU7x it is half of one (`devices` is 2). Rates
    are peaks as published, dense: nothing for sparsity, and nobody reaches them.
    """

    name: str
    kinds: tuple[str, ...]  # jax's device_kind
    memory_bytes: float  # the whole
    hbm_bytes: float  # what a program may use of it
    hbm_source: str
    flops: float | None  # bfloat16 with float32 sums, per second
    int8_ops: float | None  # per second
    hbm_bytes_per_second: float
    ici_bytes_per_second: float | None  # to all neighbours together, both directions added; NVLink on a GPU
    source: str
    chips_per_host: int | None = None  # at most; of v5e and v6e, hosts of a slice beyond 8 chips have 4
    devices: int = 1  # JAX devices to a chip
    ici_links: int | None = None  # ports; a link's rate one way is ici_bytes_per_second / (2 · ici_links)
    dcn_bytes_per_second: float | None = None  # one way, a chip's share of its host's network cards
    dcn_source: str | None = None
    usd_per_chip_hour: float | None = None  # on demand
    usd_per_chip_hour_spot: float | None = None  # moves by the day
    price_source: str | None = None
    date: str = "2026-11-21"  # when this was looked up


def _gpu(
    name: str, kind: str, gib: float, flops: float | None, int8: float, memory: float, link: float | None, source: str
) -> Chip:
    """A GPU; what it costs depends on who lets it, so no price is given."""
    return Chip(name, (kind,), gib * GIB, 0.75 * gib * GIB, JAX_SHARE, flops, int8, memory, link, source)


NVIDIA = "https://www.nvidia.com/en-us/data-center/"
CHIPS = (
    Chip(
        "v4", ("TPU v4",), 32 * GIB, 30.75 * GIB, MEGACORE, 275e12, 275e12, 1200e9, 600e9,
        "https://docs.cloud.google.com/tpu/docs/v4; six links of 50 GB/s each way: arXiv 2304.01433",
        chips_per_host=4, ici_links=6,
        usd_per_chip_hour=3.22, price_source="https://cloud.google.com/tpu/pricing, us-central2",
    ),
    Chip(
        "v5e", ("TPU v5 lite", "TPU v5e"), 16 * GIB, 15.75 * GIB, COMPILER, 197e12, 393e12, 819e9, 400e9,
        "https://docs.cloud.google.com/tpu/docs/v5e", chips_per_host=8, ici_links=4,
        dcn_bytes_per_second=3.125e9, dcn_source="the same page: 2 x 100 Gbit/s to a host of 8, 6.4 Tbit/s to a pod of 256",
        usd_per_chip_hour=1.20, usd_per_chip_hour_spot=0.245, price_source=CATALOGUE,
    ),
    Chip(
        "v5p", ("TPU v5", "TPU v5p"), 96 * GIB, 95.73 * GIB, COMPILER, 459e12, 918e12, 2765e9, 1200e9,
        "https://docs.cloud.google.com/tpu/docs/v5p, which gives 95 GB", chips_per_host=4, ici_links=6,
        dcn_bytes_per_second=6.25e9, dcn_source="the same page: 50 Gbit/s to a chip",
        usd_per_chip_hour=4.20, usd_per_chip_hour_spot=0.836, price_source=CATALOGUE,
    ),
    Chip(
        "v6e", ("TPU v6 lite", "TPU v6e"), 32 * GIB, 31.24 * GIB, COMPILER, 918e12, 1836e12, 1638e9, 800e9,
        "https://docs.cloud.google.com/tpu/docs/v6e", chips_per_host=8, ici_links=4,
        dcn_bytes_per_second=12.5e9, dcn_source="the same page: 4 x 200 Gbit/s to a host of 8, 25.6 Tbit/s to a pod of 256",
        usd_per_chip_hour=2.70, usd_per_chip_hour_spot=0.544, price_source=CATALOGUE,
    ),
    Chip(
        "tpu7x", ("TPU7x",), 96 * GIB, 94.74 * GIB, COMPILER, 2307e12 / 2, None, 7380e9 / 2, 1200e9 / 2,
        "https://docs.cloud.google.com/tpu/docs/tpu7x, halved", chips_per_host=4, devices=2,
    ),
    _gpu("H200", "NVIDIA H200", 140.4, 989e12, 1979e12, 4.8e12, 900e9, NVIDIA + "h200/"),
    _gpu("H100", "NVIDIA H100 80GB HBM3", 79.6, 989e12, 1979e12, 3.35e12, 900e9, NVIDIA + "h100/"),
    _gpu("A100-80GB", "NVIDIA A100-SXM4-80GB", 80, 312e12, 624e12, 2039e9, 600e9, NVIDIA + "a100/"),
    _gpu("A100-80GB-PCIe", "NVIDIA A100 80GB PCIe", 80, 312e12, 624e12, 1935e9, None, NVIDIA + "a100/"),
    _gpu("A100-40GB", "NVIDIA A100-SXM4-40GB", 40, 312e12, 624e12, 1555e9, 600e9, NVIDIA + "a100/"),
    _gpu("A100-40GB-PCIe", "NVIDIA A100-PCIE-40GB", 40, 312e12, 624e12, 1555e9, None, NVIDIA + "a100/"),
    _gpu("L4", "NVIDIA L4", 22.5, 121e12, 242e12, 300e9, None, NVIDIA + "l4/"),
    _gpu("T4", "Tesla T4", 15, None, 130e12, 320e9, None, NVIDIA + "tesla-t4/; no bfloat16 (65 TFLOP/s are float16's)"),
    _gpu("RTX-4090", "NVIDIA GeForce RTX 4090", 24, 165.2e12, 660.6e12, 1008e9, None,
         "NVIDIA's Ada GPU architecture whitepaper, appendix A"),
)  # fmt: skip


def of_device(kind: str) -> Chip | None:
    """The chip behind jax's `device.device_kind`; None for a CPU, part of a GPU (MIG), and whatever is not listed."""
    return next((chip for chip in CHIPS if kind in chip.kinds), None)


def named(name: str) -> Chip | None:
    """The chip of that name, such as v5e."""
    return next((chip for chip in CHIPS if chip.name == name), None)
