"""Tests run strict: 8 CPU devices, no implicit promotion of dtypes or ranks, warnings as errors, no network."""

import os
import tempfile
from pathlib import Path

os.environ.update(
    # The lowest optimisation level compiles these small programs in half the time and computes the same thing.
    XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
    JAX_PLATFORMS="cpu",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    HOME=tempfile.mkdtemp(),  # caches begin empty, and the user's stay as they are
)

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Warnings of other packages about each other, which nothing here can mend.
IGNORED = [
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft, of transformers 5
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",  # peft, when an adapter reaches the embedding
]

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


def pytest_configure(config: pytest.Config) -> None:
    for line in IGNORED:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data that lies beside the repository where there is one."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not here")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    """Two threads for torch, where a test uses it."""
    import torch

    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def no_cache_of_programs_from_another_test():
    """A run turns the cache on for its process, which in a test is everybody's."""
    from jaxft.parallel.compilation import forget

    yield
    if jax.config.jax_compilation_cache_dir is not None:
        forget()
