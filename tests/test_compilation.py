"""The cache of compiled programs: whose it is, where it may fail, and that a second start compiles nothing."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxft.parallel.compilation import keep_compiled

PROGRAM = """
import sys, jax
from jaxft.parallel.compilation import keep_compiled
counts = {}
jax.monitoring.register_event_listener(lambda event, **_: counts.update({event: counts.get(event, 0) + 1}))
keep_compiled(sys.argv[1])
print(float(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((8, 8)))))
print(counts.get("/jax/compilation_cache/cache_hits", 0), counts.get("/jax/compilation_cache/cache_misses", 0))
"""


def run(folder, program=PROGRAM):
    """`(what was computed, hits, misses, stderr)` of the program in a process of its own."""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-W", "error", "-c", program, str(folder)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *said, computed, counted = done.stdout.splitlines()
    return computed, *map(int, counted.split()), "\n".join(said)


def test_a_second_start_compiles_nothing(tmp_path):
    first, again = run(tmp_path / "xla"), run(tmp_path / "xla")
    assert first[0] == again[0]
    assert first[1] == 0 and first[2] >= 1
    assert again[1] == first[2] and again[2] == 0


def test_a_folder_that_cannot_be_written_costs_a_line_and_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    computed, hits, misses, said = run(tmp_path / "file" / "xla")
    assert (computed, hits, misses) == ("512.0", 0, 0)
    assert said.startswith("run.compilation_cache: ") and said.count("\n") == 0


@pytest.mark.parametrize(("folder", "own"), [(None, None), ("mine", "theirs")])
def test_no_cache_and_a_users_own_are_left_alone(folder, own, monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.chdir(tmp_path)
    try:
        jax.config.update("jax_compilation_cache_dir", own)
        keep_compiled(folder)
        assert jax.config.jax_compilation_cache_dir == own
        assert os.listdir(tmp_path) == []
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
