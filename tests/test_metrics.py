"""What a log line says of speed and memory, and what a terminal of 80 columns shows of it."""

import sys

import pytest

from jaxft.learn.metrics import Progress, memory, speed


class Device:
    """A device of some kind, with or without memory statistics."""

    def __init__(self, kind, stats=None):
        self.device_kind, self.stats = kind, stats

    def memory_stats(self):
        return self.stats


def test_the_rates_of_a_log_line_are_of_real_tokens_and_the_chips_own_peak():
    found = speed(5, 40_000, 2.0, [Device("TPU v5 lite")] * 8, 33.3e9)
    assert found["tokens_per_second"] == 20_000
    assert found["tokens_per_second_per_chip"] == 2500
    assert found["seconds_per_step"] == 0.4
    assert found["mfu"] == pytest.approx(33.3e9 * 2500 / 197e12)


def test_two_devices_of_a_tpu7x_are_one_chip():
    found = speed(1, 1000, 1.0, [Device("TPU7x")] * 8, 1e12)
    assert found["tokens_per_second_per_chip"] == 250
    assert found["mfu"] == pytest.approx(1e12 * 250 / 2307e12)


@pytest.mark.parametrize(("kind", "flops"), [("cpu", 1e9), ("TPU v99", 1e9), ("Tesla T4", 1e9), ("TPU v4", None)])
def test_without_a_known_peak_there_is_no_mfu(kind, flops):
    assert set(speed(1, 1, 1.0, [Device(kind)], flops)) == {
        "tokens_per_second", "tokens_per_second_per_chip", "seconds_per_step",
    }  # fmt: skip


def test_memory_is_the_fullest_devices_or_the_processs_under_its_own_name():
    full = [Device("TPU v4", {"peak_bytes_in_use": n * 2**30}) for n in (3, 7, 5)]
    assert memory(full) == {"device_memory_gib": 7.0}
    for silent in ([Device("cpu")], [Device("cpu", {})], [*full, Device("cpu")]):
        (found,) = memory(silent).items()
        assert found[0] == "host_memory_gib" and 0.05 < found[1] < 100


RECORD = {
    "step": 12345, "loss": 10.1234, "mean_token_accuracy": 0.123, "learning_rate": 2e-4, "grad_norm": 1.0,
    "tokens_per_second": 123456.0, "mfu": 0.523,
}  # fmt: skip


def test_the_bar_with_its_figures_fits_80_columns(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for name, value in (("COLUMNS", "80"), ("TERM", "xterm"), ("FORCE_COLOR", "1"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    with Progress(20000) as progress:
        progress.advance(12345)
        progress.show(RECORD)
    shown = capsys.readouterr().out
    assert "loss 10.1234  acc 0.123  tok/s 123,456  mfu 52%" in shown


def test_a_line_names_the_mfu_only_where_there_is_one(capsys):
    progress = Progress(20000)
    progress.show(RECORD)
    progress.show({k: v for k, v in RECORD.items() if k != "mfu"})
    first, second = capsys.readouterr().out.splitlines()
    assert "tokens/s 123,456  mfu 52.3%  left" in first and "mfu" not in second
