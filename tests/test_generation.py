"""Generation with a cache says what transformers says, whatever else is in the batch."""

import jax
import numpy as np
import pytest
import torch
from checkpoints import llama, load, peft_model, reload, save, tokens

from jaxft import config
from jaxft.errors import UserError
from jaxft.evals.decode import CHUNK, Generator, Sampling
from jaxft.evals.protocols import cut
from jaxft.parallel.mesh import make_mesh

NEW = 12
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip
PROMPTS = [tokens(1, length, seed=length, vocab=96)[0].tolist() for length in (1, 40, 7, 33, 32, 3, 20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(llama(vocab_size=96), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def generator(folder):
    """Without an end-of-text token."""
    return Generator(load(folder).decoder(), [])


def torch_answers(model, prompts, new=NEW):
    """Greedy continuations by transformers, one prompt at a time."""
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def test_greedy_answers_equal_transformers_for_prompts_of_all_lengths(folder, generator):
    wanted = torch_answers(reload(folder), PROMPTS)
    assert generator(PROMPTS, max_new_tokens=NEW) == wanted
    assert len({token for answer in wanted for token in answer}) > 20  # a model that repeats itself proves little


def test_greedy_answers_equal_transformers_for_another_shape_with_an_adapter(tmp_path):
    model = llama(
        vocab_size=96,
        rope_parameters=LLAMA3,
        tie_word_embeddings=True,
        num_key_value_heads=1,
        head_dim=16,
        attention_bias=True,
    )
    folder, adapter = save(model, tmp_path / "base"), tmp_path / "adapter"
    oracle = peft_model(reload(folder), target_modules=r".*\.1\..*_proj")  # layers 0 and 1 are no longer alike
    oracle.save_pretrained(adapter)
    found = Generator(load(folder, adapter=str(adapter)).decoder(), [])(PROMPTS[:4], max_new_tokens=NEW)
    assert found == torch_answers(oracle, PROMPTS[:4])
    assert found != torch_answers(reload(folder), PROMPTS[:4])


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_batch_equals_its_prompts_one_at_a_time(temperature, generator):
    together = generator(PROMPTS, max_new_tokens=NEW, sampling=Sampling(temperature, seed=3))
    assert together == generator(PROMPTS, max_new_tokens=NEW, sampling=Sampling(temperature, seed=3), batch_size=1)
    assert together == generator(PROMPTS, max_new_tokens=NEW, sampling=Sampling(temperature, seed=3), batch_size=3)
    assert (together == generator(PROMPTS, max_new_tokens=NEW, sampling=Sampling(temperature, seed=4))) == (
        temperature == 0
    )


def test_eight_devices_say_what_one_says(folder, generator):
    spread = Generator(load(folder, mesh=make_mesh(config.Mesh(tensor=2))).decoder(), [])
    assert spread(PROMPTS, max_new_tokens=NEW) == generator(PROMPTS, max_new_tokens=NEW)


def test_samples_follow_the_models_distribution(folder, generator):
    prompt, temperature, draws = PROMPTS[2], 0.7, 4096
    logits = np.asarray(load(folder).decoder()(np.array([prompt])))[0, -1].astype(np.float64) / temperature
    wanted = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    drawn = generator([prompt] * draws, max_new_tokens=1, sampling=Sampling(temperature), batch_size=draws)
    counts = np.bincount(np.array(drawn)[:, 0], minlength=96)
    # Five standard deviations of a binomial count, and one for the rare ones.
    assert (np.abs(counts - draws * wanted) <= 5 * np.sqrt(draws * wanted) + 1).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(7, None), (20, 0.5)])
def test_what_may_be_drawn_is_what_transformers_leaves(top_k, top_p, folder, generator):
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    prompt, temperature, draws = PROMPTS[2], 1.5, 1024
    scores = torch.tensor(np.asarray(load(folder).decoder()(np.array([prompt])))[0, -1:])
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    scores = scores if top_k is None else TopKLogitsWarper(top_k)(None, scores)
    scores = scores if top_p is None else TopPLogitsWarper(top_p)(None, scores)
    wanted = torch.softmax(scores, -1)[0].numpy()
    sampling = Sampling(temperature, top_k, top_p, samples=draws)
    drawn = generator([prompt], max_new_tokens=1, sampling=sampling, batch_size=draws)
    counts = np.bincount(np.array(drawn)[:, 0], minlength=96)
    assert not counts[wanted == 0].any()
    assert (np.abs(counts - draws * wanted) <= 5 * np.sqrt(draws * wanted) + 1).all()


def test_samples_of_a_prompt_differ_and_stand_side_by_side(generator):
    sampling = Sampling(1.0, samples=3)
    answers = generator(PROMPTS[:2], max_new_tokens=NEW, sampling=sampling)
    assert len(answers) == 6 and len(set(map(tuple, answers))) == 6
    assert answers == generator(PROMPTS[:2], max_new_tokens=NEW, sampling=sampling, batch_size=2)
    assert answers[::3] == generator(PROMPTS[:2], max_new_tokens=NEW, sampling=Sampling(1.0))


class Letters:
    """A tokenizer of one letter per token."""

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(ord("!") + i) for i in ids)


def test_an_answer_is_given_up_soon_after_a_stop_string(folder, generator):
    new = 100
    free = generator(PROMPTS[:4], max_new_tokens=new)
    said = [Letters().decode(answer, True) for answer in free]
    stop = said[1][10:13]
    stopping = Generator(load(folder).decoder(), [95], Letters())
    for row, (answer, text) in enumerate(zip(stopping(PROMPTS[:4], max_new_tokens=new, stop=[stop]), said)):
        ended = free[row].index(95) if 95 in free[row] else new
        given_up = min(ended, -(-(text.index(stop) + len(stop)) // CHUNK) * CHUNK) if stop in text[:ended] else ended
        assert answer == free[row][:given_up]
    assert cut(said[1], [stop, ""]) == said[1][:10]


def test_an_answer_ends_before_its_first_end_token(folder, generator):
    free = generator(PROMPTS, max_new_tokens=NEW)
    ends = [free[0][5], free[1][2]]  # two end tokens, as chat models have; other prompts go on alone
    stopped = Generator(load(folder).decoder(), ends)(PROMPTS, max_new_tokens=NEW)
    wanted = [answer[: min([i for i, t in enumerate(answer) if t in ends], default=None)] for answer in free]
    assert stopped == wanted
    assert len(stopped[1]) <= 2 and NEW in map(len, stopped)


def test_other_trainable_parameters_can_be_handed_in(folder):
    loaded = load(folder, config.Lora(rank=2))
    generator = Generator(loaded.decoder(), [])
    changed = jax.tree.map(lambda x: x + 0.2, loaded.trainable)
    plain = generator(PROMPTS[:3], max_new_tokens=NEW)
    assert generator(PROMPTS[:3], max_new_tokens=NEW, trainable=changed) != plain
    assert generator(PROMPTS[:3], max_new_tokens=NEW) == plain


@pytest.mark.parametrize(
    ("prompts", "new", "shown"),
    [
        ([[5], [5] * 250], 12, "prompt 1: 250 tokens + 12 new ones exceed the model's 256 positions"),
        ([[5, 96]], 1, "prompt 0: token 96 is not in the model's vocabulary, which ends at 95"),
        ([[5, -1]], 1, "prompt 0: token -1"),
        ([[5], []], 1, "prompt 1: empty"),
        ([[5]], 0, "max_new_tokens: expected at least 1, found 0"),
    ],
    ids=str,
)
def test_a_prompt_that_cannot_be_continued_is_refused(prompts, new, shown, generator):
    with pytest.raises(UserError) as error:
        generator(prompts, max_new_tokens=new)
    assert shown in str(error.value)


def test_the_last_position_can_be_used(folder, generator):
    prompt = tokens(1, 256 - NEW, seed=9, vocab=96)[0].tolist()
    assert generator([prompt], max_new_tokens=NEW) == torch_answers(reload(folder), [prompt])


def test_no_prompts_give_no_answers(generator):
    assert generator([], max_new_tokens=NEW) == []
