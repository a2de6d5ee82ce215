"""jaxft: JAX/TPU-first LoRA fine-tuning of Hugging Face checkpoints."""

__version__ = "0.1.0"
