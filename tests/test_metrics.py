"""What a log line says of speed and memory, and what a terminal of 80 columns shows of it."""

import sys

import pytest

from jaxft.learn.metrics import memory, speed
from jaxft.learn.progress import Progress, tell


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


def test_lines_break_between_words_in_a_terminal_and_nowhere_else(monkeypatch, capsys):
    line = "trained: LoRA r=8 on " + " ".join(f"{name}_proj×4" for name in "q k v o gate up down".split())
    tell(line)
    assert capsys.readouterr().out == line + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    tell(line)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 and all(len(part) <= 60 for part in shown) and shown[1].startswith("  ")
    assert " ".join(part.strip() for part in shown) == line


@pytest.mark.parametrize("terminal", [True, False])
def test_an_evaluation_is_a_line_that_stays(terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    for name, value in (("COLUMNS", "80"), ("TERM", "xterm"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    record = {"step": 120, "eval_loss": 0.5, "eval_mean_token_accuracy": 0.9, "probe_loss": 0.25}
    with Progress(240) as progress:
        progress.evaluated(record, None)
        progress.evaluated({k: v for k, v in record.items() if k != "probe_loss"}, (0.25, 60))
    out = capsys.readouterr().out
    names = ("acc", "probe") if terminal else ("eval_accuracy", "probe_loss")
    assert f"step   120/240  eval_loss 0.5000  {names[0]} 0.900  {names[1]} 0.2500  (best)\n" in out.replace("\r", "")
    assert f"eval_loss 0.5000  {names[0]} 0.900  (best 0.2500 at step 60)\n" in out
