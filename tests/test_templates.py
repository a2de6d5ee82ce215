"""The families' published chat formats and templates of the user's own: what is rendered, and what of it is trained."""

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat import build, trained
from tokenizers import processors

from jaxft import config, train
from jaxft.config import Config, Data, Lora, Model, Optim
from jaxft.data import chat
from jaxft.data.rows import Row, Turn
from jaxft.errors import UserError, one_line

# Re-stated after the templates in the published tokenizer_config.json files, without their branches for tools.
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if messages[0].role == 'system' %}
    {%- set system_message = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" + system_message | default("") + "<|eot_id|>" }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}" + ALTERNATE + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN2 = (
    "{% for m in messages %}{% if loop.first and messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}{% for m in turns %}" + ALTERNATE + "{% if "
    "loop.index0 == 0 and system != false %}{% set said = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}"
    "{% else %}{% set said = m.content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + said.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + said.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

ASK, ANSWER, MORE, LAST = "How many?", "12 apples.", "And then?", "None."
TALK = (Turn("user", ASK), Turn("assistant", ANSWER), Turn("user", MORE), Turn("assistant", LAST))
SYSTEM = Turn("system", "Be brief.")


@dataclass(frozen=True)
class Family:
    """A template, the special tokens of its tokenizers, and what the conversation above reads like in it."""

    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    head: str  # up to the first question
    between: tuple[str, str]  # a question and its answer, an answer and the next question
    end: str
    system: str | None = None  # `head` where a system turn comes first; None: refused
    before: str = ""  # what the answer's first token holds beside it

    @property
    def tokenizer(self):
        """A small byte-level tokenizer with these special tokens, which puts BOS where the published ones do."""
        made = build(self.template, bos=None, eos=None)
        special = {"eos_token": self.eos, "additional_special_tokens": [*self.special]}
        made.add_special_tokens(special | ({"bos_token": self.bos} if self.bos else {}))
        if self.bos:
            pair = [(self.bos, made.bos_token_id)]
            made.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{self.bos} $A", None, pair)
        return made

    def reads(self, head: str) -> str:
        """The whole conversation as text."""
        to_answer, to_question = self.between
        first = f"{head}{ASK}{to_answer}{self.before}{ANSWER}{self.end}{to_question}"
        return f"{first}{MORE}{to_answer}{self.before}{LAST}{self.end}"


HEADERS = "<|start_header_id|>{}<|end_header_id|>\n\n".format
DATED = "<|begin_of_text|>" + HEADERS("system") + "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
# OpenELM has Llama 2's tokenizer, and Gemma 2 has Gemma's.
FAMILIES = {
    "llama3": Family(
        LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|begin_of_text|>", "<|end_of_text|>",
        f"{DATED}<|eot_id|>{HEADERS('user')}", (f"<|eot_id|>{HEADERS('assistant')}", HEADERS("user")), "<|eot_id|>",
        f"{DATED}Be brief.<|eot_id|>{HEADERS('user')}",
    ),
    "gemma": Family(
        GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", "<bos><start_of_turn>user\n",
        ("<end_of_turn>\n<start_of_turn>model\n", "<start_of_turn>user\n"), "<end_of_turn>\n",
    ),
    "qwen2": Family(
        QWEN2, ("<|im_start|>", "<|im_end|>"), None, "<|endoftext|>",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        ("<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>user\n"), "<|im_end|>\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
    ),
    "llama2": Family(
        LLAMA2, (), "<s>", "</s>", "<s>[INST] ", (" [/INST]", "<s>[INST] "), " </s>",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n", " ",
    ),
}  # fmt: skip
BUILT = {name: family.tokenizer for name, family in FAMILIES.items()}


def talk(*turns, at="rows.jsonl:3"):
    return Row(turns or TALK, at)


def own(template, tokenizer=None):
    """A template of the user's own as training chooses it, with a tokenizer that has another one."""
    tokenizer = tokenizer or BUILT["qwen2"]
    return tokenizer, chat.choose_template(template, tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_reads_as_its_family_published_it(name):
    tokenizer, family = BUILT[name], FAMILIES[name]
    assert tokenizer.decode(chat.encode(talk(), tokenizer, "chat").tokens) == family.reads(family.head)
    if family.system:
        example = chat.encode(talk(SYSTEM, *TALK), tokenizer, "chat")
        assert tokenizer.decode(example.tokens) == family.reads(family.system)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_is_trained_up_to_its_end_of_turn_and_nothing_else(name):
    tokenizer, family = BUILT[name], FAMILIES[name]
    answers = [family.before + answer + family.end for answer in (ANSWER, LAST)]
    for row in [talk(), *([talk(SYSTEM, *TALK)] if family.system else [])]:
        assert trained(chat.encode(row, tokenizer, "chat"), tokenizer) == answers
        assert trained(chat.encode(row, tokenizer, "chat", "last"), tokenizer) == answers[1:]
    every, last = (chat.encode(talk(), tokenizer, "chat", which) for which in ("all", "last"))
    np.testing.assert_array_equal(every.tokens, last.tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_generation_prompt_is_the_training_prefix_token_for_token(name):
    tokenizer, asked = BUILT[name], [TALK[:2], TALK]
    for turns in asked + [(SYSTEM, *turns) for turns in asked if FAMILIES[name].system]:
        example = chat.encode(talk(*turns), tokenizer, "chat", "last")
        for source in (talk(*turns), turns, turns[:-1]):
            prompt = chat.prompt_tokens(source, tokenizer, "chat")
            assert prompt == example.tokens[: len(prompt)].tolist() and example.loss_mask.argmax() == len(prompt)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("writes", [True, False])
def test_there_is_one_bos_whoever_writes_it(name, adds, writes):
    family = FAMILIES[name]
    if not family.bos:
        assert BUILT[name].bos_token is None and not chat.adds_bos(BUILT[name])
        return
    template = family.template if writes else family.template.replace("bos_token", "''")
    tokenizer = replace(family, template=template).tokenizer
    if not adds:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A", None, [])
    for ids in (
        chat.encode(talk(*TALK[:2]), tokenizer, "chat").tokens.tolist(),
        chat.prompt_tokens(TALK[:1], tokenizer, "chat"),
    ):
        assert ids.count(tokenizer.bos_token_id) == (adds or writes)
        assert (ids[0] == tokenizer.bos_token_id) == (adds or writes)


def test_llama_2_begins_every_exchange_with_a_bos_of_its_own():
    ids = chat.encode(talk(), BUILT["llama2"], "chat").tokens
    assert (ids == BUILT["llama2"].bos_token_id).sum() == 2 == (ids == BUILT["llama2"].eos_token_id).sum()


@pytest.mark.parametrize("asks", ["{{ date_string }}", "{{ strftime_now('%d %b %Y') }}"])
def test_the_day_of_a_row_does_not_depend_on_the_day(asks):
    """Mistral's and Granite's templates ask the clock themselves; Llama 3.2's only where it is given no date_string."""
    tokenizer, template = own(f"\n{asks} " + QWEN2)
    assert chat.render(talk(), tokenizer, template).text.startswith("\n26 Jul 2024 <|im_start|>")
    iso = chat.render(talk(), *own("{{ strftime_now('%Y-%m-%d') }}" + QWEN2)).text
    assert iso.startswith("2024-07-26<|im_start|>")


@pytest.mark.parametrize(
    ("turns", "why"),
    [
        ((SYSTEM, *TALK), r"refuses turns system, user, assistant, user, assistant \(System role not supported\)"),
        ((TALK[0], TALK[0], TALK[1]), r"refuses turns user, user, assistant \(Conversation roles must alternate"),
    ],
)
def test_what_gemma_refuses_is_named_with_the_row_and_a_remedy(turns, why):
    with pytest.raises(UserError, match=rf"^rows.jsonl:3: the chat template {why}.*set data\.template plain"):
        chat.encode(talk(*turns), BUILT["gemma"], "chat")
    with pytest.raises(UserError, match=r"^prompt: the chat template refuses turns"):
        chat.prompt_tokens(turns, BUILT["gemma"], "chat")


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_what_an_assistant_says_before_anybody_asked_is_read_and_not_trained(name):
    tokenizer, family = BUILT[name], FAMILIES[name]
    example = chat.encode(talk(Turn("assistant", "Hello!"), *TALK), tokenizer, "chat")
    assert "Hello!" in tokenizer.decode(example.tokens)
    assert trained(example, tokenizer) == [answer + family.end for answer in (ANSWER, LAST)]
    with pytest.raises(UserError, match=r"^rows.jsonl:3: "):
        chat.encode(talk(TALK[1]), tokenizer, "chat")


OWN = (
    "{% for m in messages %}<|im_start|>{{ 'Q' if m.role == 'user' else 'A' }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>A: {% endif %}"
)


def test_a_template_of_ones_own_replaces_the_tokenizers_as_text_and_as_file(tmp_path):
    (tmp_path / "own.jinja").write_text(OWN + "\n")
    for given_as in (OWN, str(tmp_path / "own.jinja")):
        tokenizer, template = own(given_as)
        example = chat.encode(talk(), tokenizer, template)
        assert tokenizer.decode(example.tokens) == (
            "<|im_start|>Q: How many?<|im_end|><|im_start|>A: 12 apples.<|im_end|>"
            "<|im_start|>Q: And then?<|im_end|><|im_start|>A: None.<|im_end|>"
        )
        assert [text.strip() for text in trained(example, tokenizer)] == ["12 apples.<|im_end|>", "None.<|im_end|>"]
        assert chat.template_name(template) == "the config's Jinja template"
    bare = build(bos=None, eos=None)  # no EOS, which this template does not need
    assert bare.decode(chat.encode(talk(), bare, OWN).tokens).endswith("None.<|im_end|>")


@pytest.mark.parametrize("header", ["{% if add_generation_prompt %}assistant: {% endif %}", ""])
def test_without_an_end_of_turn_eos_is_appended_and_trained_whatever_the_answer(header):
    """Also where the answer is a part of its own header, or of an end of turn."""
    tokenizer, template = own("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + header)
    for answer in (LAST, "s", "a", ">", "None", "<|endoftext|", "x" * 200):
        row = talk(TALK[0], Turn("assistant", answer))
        example = chat.encode(row, tokenizer, template)
        assert tokenizer.decode(example.tokens) == f"user: How many?\nassistant: {answer}\n<|endoftext|>"
        assert trained(example, tokenizer)[0].endswith(f"{answer}\n<|endoftext|>")
        assert trained(chat.encode(row, tokenizer, "chat"), tokenizer) == [answer + "<|im_end|>\n"]
    with pytest.raises(UserError, match="it has no EOS"):
        chat.encode(talk(), build(eos=None), template)


DROPS = "{% for m in messages %}<|im_start|>{{ m.content if m.role == 'user' else 'assistant' }}<|im_end|>{% endfor %}"
WRONG = {
    "drops the answer": (DROPS, r"drops answer 1"),
    "raises": ("{{ raise_exception('no\nway') }}", r"refuses turns user, assistant, user, assistant \(no\s+way\)"),
    "escapes": ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
    "escapes by a filter": ("{{ messages | attr('__class__') }}", "drops answer 1|unsafe"),
    "changes the messages": ("{{ messages.append(messages[0]) }}", "access to attribute 'append' .* is unsafe"),
    "reads a file": ("{% include '/etc/passwd' %}{{ 1 }}", "refuses turns .*no loader"),
    "no Jinja": ("{% if %}", "refuses turns .*end of statement block"),
    "adds a number to text": ("{{ messages[0].content + 1 }}", "refuses turns .*can only concatenate"),
    "divides by zero": ("{{ 1 / 0 }}", r"refuses turns .*\(division by zero\)"),
    "never ends": ("{% for i in range(10 ** 12) %}{% endfor %}", "refuses turns .*Range too big"),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses turns .*recursion"),
    "misses an index": ("{{ '{0}'.format() }}", "refuses turns .*index out of range"),
    "changes its mind": ("{{ messages | length }}" + QWEN2, "cannot be masked: .* before answer 1 is no prefix"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_template_that_goes_wrong_is_one_line_with_the_row(wrong):
    template, why = WRONG[wrong]
    with pytest.raises(UserError) as said:
        chat.encode(talk(), *own(template))
    line = one_line(said.value)
    assert re.match(rf"rows.jsonl:3: the chat template .*({why}).*set data\.template plain$", line) and len(line) < 400


def test_an_answer_that_the_template_drops_is_missed_however_short():
    for answer in ("a", "s", "assistant"):
        with pytest.raises(UserError, match="drops answer 1"):
            chat.encode(talk(TALK[0], Turn("assistant", answer)), *own(DROPS))


def test_names_and_files_that_are_no_template_are_refused(tmp_path):
    (tmp_path / "text.jinja").write_text("Question:")
    (tmp_path / "latin.jinja").write_bytes(b"{{ '\xe9' }}")
    for given_as, why in [
        ("alpaca", "unknown template 'alpaca'; use auto, plain, chat, or a Jinja template"),
        (str(tmp_path / "none.jinja"), "none.jinja: cannot be read"),
        (str(tmp_path / "latin.jinja"), "latin.jinja: cannot be read"),
        (str(tmp_path / "text.jinja"), "text.jinja: no Jinja template"),
    ]:
        with pytest.raises(UserError, match=r"^data\.template: .*") as said:
            own(given_as)
        assert why in one_line(said.value)


def test_a_run_takes_a_template_from_a_file(tmp_path):
    (tmp_path / "own.jinja").write_text(OWN.replace("<|im_start|>", "").replace("<|im_end|>", "\n"))
    file = str(tmp_path / "own.jinja")
    data = Data(name="generated:word_problems", limit=20, max_length=256, template=file, cache=None)
    settings = Config(model=Model("builtin:tiny"), lora=Lora(), data=data, optim=Optim(batch_size=8))
    config.validate(settings)
    job = train.prepare(settings)
    assert job.data.facts["template"] == "the config's Jinja template"
    text = job.tokenizer.decode(job.data.train.examples[0].tokens)
    assert text.startswith(job.tokenizer.bos_token + "Q: ") and text.endswith("\n" + job.tokenizer.eos_token)


UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SAID = UNICODE.filter(lambda text: text.strip() == text != "")


@pytest.mark.parametrize("name", FAMILIES)
@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(UNICODE, SAID), min_size=1, max_size=3), st.sampled_from(["all", "last"]))
def test_of_any_turns_the_answers_and_their_ends_are_trained(name, exchanges, train_on):
    tokenizer, family = BUILT[name], FAMILIES[name]
    turns = [Turn(role, text) for pair in exchanges for role, text in zip(("user", "assistant"), pair)]
    example = chat.encode(talk(*turns), tokenizer, "chat", train_on)
    answers = [family.before + answer + family.end for _, answer in exchanges]
    assert trained(example, tokenizer) == (answers if train_on == "all" else answers[-1:])
    prompt = chat.prompt_tokens(turns[:-1], tokenizer, "chat")
    assert example.tokens[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("name", ["llama3", "llama2"])
def test_real_tokenizers_render_and_train_their_families_format(shared, name):
    tokenizer, family = chat.load_tokenizer(shared / "tokenizers" / name), FAMILIES[name]
    with pytest.raises(UserError, match="has no chat template"):
        chat.choose_template("chat", tokenizer)
    tokenizer.chat_template = family.template
    example = chat.encode(talk(SYSTEM, *TALK), tokenizer, "chat")
    text = tokenizer.decode(example.tokens)
    assert "".join(text.split()) == "".join(family.reads(family.system).split())  # Llama 2's decoder adds spaces
    said = [text.strip() for text in trained(example, tokenizer)]
    assert said == [(answer + family.end).strip() for answer in (ANSWER, LAST)]
    prompt = chat.prompt_tokens((SYSTEM, *TALK), tokenizer, "chat")
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert example.tokens[0] == tokenizer.bos_token_id != example.tokens[1]
    if name == "llama3":
        assert text == family.reads(family.system) and (example.tokens == tokenizer.bos_token_id).sum() == 1
