"""What is trained of a row: templates, masks, BOS and EOS, cutting."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxft.config import Data
from jaxft.data import chat, rows
from jaxft.data.rows import Row, Turn
from jaxft.errors import UserError

SHARED = Path(__file__).resolve().parents[1].parent / "shared"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Puts BOS itself, trims, and begins with a date as Llama 3.2's does.
HEADERS = (
    "<bos>{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|head|>system<|/head|>\n\nToday Date: {{ date_string }}<|eot|>"
    "{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
)
FORGETS = (  # Renders only the last answer, as templates do that strip the reasoning of earlier turns.
    "{% for m in messages %}{% if m.role == 'user' or loop.last %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}"
)
LINES = (  # No special tokens: the line break that ends an answer merges with the one that begins the next turn.
    "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}assistant:{% endif %}"
)
DROPS = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}<|im_end|>"
SPECIAL = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"]


def build(template=None, bos="<bos>", eos="<eos>"):
    """A byte-level BPE of about 400 tokens that puts `bos` before ordinary text."""
    core = Tokenizer(models.BPE())
    # Line breaks stay together whatever follows, as in Llama 3 and Qwen 2; GPT-2's own pattern parts them.
    words = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s| ?[^\s\p{L}\p{N}]+"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    texts = ["Question: How many apples are there?\nAnswer: There are 12 apples.", "assistant user system\n\n"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, chat_template=template)


@pytest.fixture(scope="module")
def plain():
    return build()


@pytest.fixture(params=["llama2", "llama3", "stories260k"])
def real(request):
    folder = SHARED / ("models" if request.param == "stories260k" else "tokenizers") / request.param
    if not folder.is_dir():
        pytest.skip("../shared is not here")
    return chat.load_tokenizer(folder)


def exchange(question="How many?", answer="12 apples"):
    return Row((Turn("user", question), Turn("assistant", answer)), "rows.jsonl:1")


TALK = Row(
    (
        Turn("system", "Be brief."),
        Turn("user", "How many?"),
        Turn("assistant", "12 apples."),
        Turn("user", "And then?"),
        Turn("assistant", "None."),
    ),
    "rows.jsonl:2",
)


def trained(example, tokenizer):
    """Each trained run of tokens as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.loss_mask.astype(int), [0]])))
    return [tokenizer.decode(example.tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_plain_rows_train_the_answer_with_its_space_and_eos(plain):
    example = chat.encode(exchange(), plain, "plain")
    assert plain.decode(example.tokens) == "<bos>Question: How many?\nAnswer: 12 apples<eos>"
    assert trained(example, plain) == [" 12 apples<eos>"]
    assert example.tokens.dtype == np.int32 and example.loss_mask.dtype == bool


def test_plain_conversations_train_every_answer_each_with_eos(plain):
    example = chat.encode(TALK, plain, "plain")
    text = "Be brief.\n\nQuestion: How many?\nAnswer: 12 apples.<eos>\n\nQuestion: And then?\nAnswer: None.<eos>"
    assert plain.decode(example.tokens) == "<bos>" + text
    assert trained(example, plain) == [" 12 apples.<eos>", " None.<eos>"]


def test_a_verbatim_prompt_is_kept_to_the_letter(plain):
    row = Row((Turn("user", "x"), Turn("assistant", "y z")), "f:1", prompt="Below:\n")
    example = chat.encode(row, plain, "plain")
    assert plain.decode(example.tokens) == "<bos>Below:\ny z<eos>" and trained(example, plain) == ["y z<eos>"]


@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize("text", ["All of it", "All of it<eos>", "<bos>All of it"])
def test_a_text_row_is_trained_whole_but_for_bos_and_ends_once(text, template):
    tokenizer = build(CHATML)
    example = chat.encode(Row((Turn("text", text),), "f:1"), tokenizer, template)
    assert tokenizer.decode(example.tokens) == "<bos>All of it<eos>"
    assert trained(example, tokenizer) == ["All of it<eos>"]


def test_a_tokenizer_without_bos_gets_none_and_the_first_token_is_no_target():
    tokenizer = build(bos=None)
    example = chat.encode(Row((Turn("text", "All"),), "f:1"), tokenizer, "plain")
    assert tokenizer.decode(example.tokens) == "All<eos>" and not example.loss_mask[0] and example.loss_mask[1:].all()


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>\n"), (HEADERS, "<|eot|>")])
def test_chat_templates_train_every_answer_with_its_end_of_turn(template, end):
    tokenizer = build(template)
    example = chat.encode(TALK, tokenizer, "chat")
    assert trained(example, tokenizer) == ["12 apples." + end, "None." + end]
    assert (example.tokens == tokenizer.bos_token_id).sum() == 1 and example.tokens[0] == tokenizer.bos_token_id


def test_a_token_that_ends_an_answer_and_begins_the_next_turn_is_trained():
    tokenizer = build(LINES)
    assert trained(chat.encode(TALK, tokenizer, "chat"), tokenizer) == [" 12 apples.\n\n", " None.\n<eos>"]


def test_the_date_in_a_template_is_pinned():
    tokenizer = build(HEADERS)
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(chat.encode(TALK, tokenizer, "chat").tokens)


@pytest.mark.parametrize("template", [None, CHATML, HEADERS])
@pytest.mark.parametrize("row", [exchange(), TALK, exchange(answer="\n\n 12")])
def test_a_prompt_is_the_row_up_to_its_last_answer_as_row_or_as_turns(template, row):
    tokenizer, name = build(template), "chat" if template else "plain"
    prompt, example = chat.prompt_tokens(row, tokenizer, name), chat.encode(row, tokenizer, name)
    assert prompt == chat.prompt_tokens(row.turns[:-1], tokenizer, name)
    last = len(trained(example, tokenizer)[-1])
    assert tokenizer.decode(example.tokens)[:-last].startswith(tokenizer.decode(prompt)[:-2])
    if not row.turns[-1].content.startswith("\n"):
        assert example.tokens[: len(prompt)].tolist() == prompt


def test_text_turns_are_a_prompt_by_themselves_and_text_rows_give_bos_alone(plain):
    turns = (Turn("text", "Once"),)
    assert plain.decode(chat.prompt_tokens(turns, plain, "plain")) == "<bos>Once"
    assert chat.prompt_tokens(Row(turns, "f:1"), plain, "plain") == [plain.bos_token_id]


UNICODE = st.characters(exclude_categories=["Cs"])
PLAIN, CHAT = build(), build(CHATML)


@settings(deadline=None, max_examples=60)
@given(st.text(UNICODE, max_size=30), st.text(UNICODE))
def test_any_unicode_is_trained_up_to_its_boundary(question, answer):
    for tokenizer, template, end in ((PLAIN, "plain", "<eos>"), (CHAT, "chat", "<|im_end|>\n")):
        example = chat.encode(exchange(question, answer), tokenizer, template)
        target = tokenizer.decode(example.tokens[example.loss_mask])
        assert target.endswith((" " if template == "plain" else "") + answer + end)
        # A token astride the boundary is trained, so the target may begin a little early, never late.
        assert len(target) <= len(answer + end) + 8


def test_a_token_astride_the_boundary_is_trained(plain):
    assert plain.tokenize("Question") == ["Question"]
    row = Row((Turn("user", "x"), Turn("assistant", "tion")), "f:1", prompt="Is it a Ques")
    assert trained(chat.encode(row, plain, "plain"), plain) == ["Question<eos>"]


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (NO_SYSTEM, TALK, "rows.jsonl:2: the chat template refuses turns system, user.*System role not supported"),
        (FORGETS, TALK, "rows.jsonl:2: the chat template cannot be masked: .* before answer 1 is no prefix"),
        (DROPS, exchange(), "rows.jsonl:1: the chat template drops answer 1"),
    ],
)
def test_templates_that_cannot_be_masked_name_the_row(template, row, message):
    with pytest.raises(UserError, match=message):
        chat.encode(row, build(template), "chat")


def test_the_template_is_chosen_by_option_and_tokenizer(plain):
    assert chat.choose_template("auto", plain) == chat.choose_template("plain", plain) == "plain"
    assert chat.choose_template("auto", build(CHATML)) == "chat"
    assert chat.choose_template("plain", build(CHATML)) == "plain"
    with pytest.raises(UserError, match=r"data\.template: chat, but the tokenizer has no chat template"):
        chat.choose_template("chat", plain)
    with pytest.raises(UserError, match=r"data\.template: unknown template 'alpaca'"):
        chat.choose_template("alpaca", plain)


def test_plain_needs_a_tokenizer_with_eos_and_chat_does_not():
    with pytest.raises(UserError, match="it has no EOS"):
        chat.choose_template("plain", build(eos=None))
    tokenizer = build(CHATML, eos=None)
    assert trained(chat.encode(exchange(), tokenizer, "chat"), tokenizer) == ["12 apples<|im_end|>\n"]


def test_long_rows_are_cut_or_dropped_and_counted(plain):
    made = [exchange(answer="1" * 5), exchange(answer="1" * 50), exchange(question="1" * 50)]
    whole = [chat.encode(row, plain, "plain") for row in made]
    length = len(whole[0].tokens)
    examples, counts = chat.encode_all(made, plain, "plain", length)
    assert (counts.kept, counts.cut, counts.dropped) == (2, 1, 1)
    assert counts.longest == max(len(e.tokens) for e in whole) and counts.tokens == 2 * length
    assert counts.trained_tokens == sum(e.loss_mask.sum() for e in examples)
    assert all(e.loss_mask.any() for e in examples)
    np.testing.assert_array_equal(examples[1].tokens, whole[1].tokens[:length])


def test_no_row_that_fits_says_so_with_the_shortest(plain):
    row = exchange(question="1" * 50)
    shortest = len(chat.encode(row, plain, "plain").tokens)
    with pytest.raises(UserError, match=rf"data\.max_length: 8 tokens .* shortest row has {shortest} tokens"):
        chat.encode_all([row, exchange(question="1" * 80)], plain, "plain", 8)
    with pytest.raises(UserError, match="no rows"):
        chat.encode_all([], plain, "plain", 8)


def test_a_token_beyond_the_vocabulary_is_named_with_its_text(plain):
    example = chat.encode(exchange(), plain, "plain")
    highest = int(example.tokens.max())
    chat.encode_all([exchange()], plain, "plain", 64, vocab_size=highest + 1)
    with pytest.raises(UserError, match=rf"rows.jsonl:1: token id {highest} \('.+'\) is beyond .* of {highest}"):
        chat.encode_all([exchange()], plain, "plain", 64, vocab_size=highest)


def test_encoding_many_rows_equals_encoding_each(plain, monkeypatch):
    monkeypatch.setattr(chat, "CHUNK", 2)
    made = [exchange(str(i), "x" * i + ".") for i in range(5)]
    for row, example in zip(made, chat.encode_all(made, plain, "plain", 64)[0], strict=True):
        single = chat.encode(row, plain, "plain")
        np.testing.assert_array_equal(example.tokens, single.tokens)
        np.testing.assert_array_equal(example.loss_mask, single.loss_mask)


def test_a_tokenizer_is_loaded_from_its_folder_only(plain, tmp_path):
    plain.save_pretrained(tmp_path / "good")
    assert chat.load_tokenizer(tmp_path / "good").eos_token == "<eos>"
    (tmp_path / "bare").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for name, message in [("none", "no such folder"), ("bare", "no tokenizer.json"), ("broken", "cannot be loaded")]:
        with pytest.raises(UserError, match=message):
            chat.load_tokenizer(tmp_path / name)


def test_real_rows_train_exactly_their_answers(real):
    made = rows.load(Data(files=(str(SHARED / "data/gsm8k_train.jsonl"),), limit=300), 0).train
    for row, example in zip(made, chat.encode_all(made, real, "plain", 4096, len(real))[0], strict=True):
        prompt, answer = chat.prompt_tokens(row, real, "plain"), row.turns[-1].content
        assert real.decode(example.tokens[example.loss_mask]).strip() == answer.strip() + real.eos_token
        assert example.tokens[: len(prompt)].tolist() == prompt and example.loss_mask.argmax() == len(prompt)
        assert (example.tokens == real.bos_token_id).sum() == 1 and example.tokens[-1] == real.eos_token_id


def test_real_alpaca_rows_follow_the_standard_prompt(real):
    made = rows.load(Data(files=(str(SHARED / "data/alpaca_gpt4_1k.json"),), limit=200), 0).train
    for row, example in zip(made, chat.encode_all(made, real, "plain", 4096)[0], strict=True):
        prompt = chat.prompt_tokens(row, real, "plain")
        assert real.decode(prompt).rstrip(" ").endswith("### Response:\n")
        assert example.tokens[: len(prompt)].tolist() == prompt and example.loss_mask.argmax() == len(prompt)
