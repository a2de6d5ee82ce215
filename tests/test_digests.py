"""model.verify: weights that changed at the same length are found by the digest that the Hub's cache names them by."""

import hashlib
import shutil

import pytest

from jaxft import config
from jaxft.errors import UserError, one_line, redacted
from jaxft.weights import model
from jaxft.weights.hub import BUILTIN

TINY = BUILTIN["builtin:tiny"]


@pytest.fixture
def snapshot(tmp_path):
    """The embedded model as the Hub's cache holds it."""
    folder, blobs = tmp_path / "models--o--n" / "snapshots" / "0123", tmp_path / "models--o--n" / "blobs"
    shutil.copytree(TINY, folder)
    blobs.mkdir()
    content = (folder / "model.safetensors").read_bytes()
    blob = blobs / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    return folder


def test_whole_weights_pass_and_one_flipped_bit_is_named_with_the_remedy(snapshot):
    assert model.find(config.Model(str(snapshot), verify=True)).files
    blob = (snapshot / "model.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    content[-5] ^= 1
    blob.write_bytes(content)
    assert model.find(config.Model(str(snapshot))).files  # which is what the option is for
    with pytest.raises(UserError, match=rf"model.safetensors: its SHA-256 is \w+, the Hub's is {blob.name}: .*remove"):
        model.find(config.Model(str(snapshot), verify=True))


def test_where_no_digest_is_known_that_is_said():
    with pytest.raises(UserError, match=r"model.verify: .*model.safetensors: no SHA-256 of it is known here"):
        model.find(config.Model("builtin:tiny", verify=True))


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ('{"hf_token": "abcdef123", "n": 1}', '{"hf_token": "***", "n": 1}'),
        ("WANDB_API_KEY=0123456789abcdef is set", "WANDB_API_KEY=*** is set"),
        ("https://x/y?token=abcd&z=1&X-Goog-Signature=aaaa", "https://x/y?token=***&z=1&X-Goog-Signature=***"),
        ("Authorization: Bearer abcdefgh", "Authorization: Bearer ***"),
        ('{"password": null, "api_key": "x1y2z3"}', '{"password": null, "api_key": "***"}'),
        ("max_new_tokens: 256, eos_token: '<|end|>'", "max_new_tokens: 256, eos_token: '<|end|>'"),
    ],
)
def test_the_value_of_a_key_that_names_a_secret_is_not_shown(said, shown):
    assert redacted(said) == shown == one_line(said)
