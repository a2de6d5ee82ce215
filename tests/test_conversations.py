"""Chat templates of evaluations, prompts and previews: rendered as transformers would, and in the sandbox as training's are."""

import json
import shutil
from importlib import import_module

import pytest
from test_templates import BUILT, FAMILIES

from jaxft import evaluate, preview
from jaxft.data import conversation
from jaxft.data.sandbox import Sandbox
from jaxft.errors import UserError
from jaxft.weights.hub import BUILTIN

TALK = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": " 12 apples. "},
    {"role": "user", "content": "And then?"},
]
WHOLE = [*TALK, {"role": "assistant", "content": "There are  "}]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_what_transformers_makes_of_it_with_a_new_answer_and_one_to_go_on_from(name):
    tokenizer = BUILT[name]
    theirs = {"tokenize": False, "date_string": conversation.DATE}
    wanted = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, **theirs)
    assert conversation.prompt(TALK, tokenizer, remedy="") == wanted
    for content in ("There are  ", "There are", "a [INST] \n"):
        messages = [*TALK, {"role": "assistant", "content": content}]
        wanted = tokenizer.apply_chat_template(messages, continue_final_message=True, **theirs)
        assert conversation.prompt(messages, tokenizer, goes_on=True, remedy="") == wanted


def test_a_message_that_the_template_drops_cannot_be_gone_on_from():
    tokenizer = BUILT["qwen2"]
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template="{{ messages | length }}")
    with pytest.raises(UserError, match=r"drops the message that the answer goes on from; leave it$"):
        conversation.prompt(WHOLE, tokenizer, goes_on=True, remedy="leave it")


BOMBS = {
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filling the memory": "{{ 'a' * 10**10 }}",
}


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """`asked(verb, template, *words)`: what a verb says to the embedded model with such a chat template."""
    monkeypatch.setattr(conversation, "SANDBOX", Sandbox(cpu_seconds=0.5))
    folder = shutil.copytree(BUILTIN["builtin:tiny"], tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    row = {"question": "1+1?", "answer": "It is #### 2"}
    rows.write_text("".join(json.dumps(row | {"question": f"{i}+1?"}) + "\n" for i in range(20)))

    def asked(verb, template, *words):
        (folder / "chat_template.jinja").write_text(template)
        named = {"MODEL": folder, "ROWS": rows, "OUT": tmp_path / "out"}
        with pytest.raises(UserError) as said:
            verb([str(named.get(word, word)) for word in words])
        return str(said.value)

    yield asked
    conversation.SANDBOX.close()


TRAINS = ("--config", "tiny_cpu.py", "--model.name", "MODEL", "--data.files", "ROWS", "--data.cache", "none")
MEASURES = ("--model", "MODEL", "--test-files", "ROWS", "--shot-files", "ROWS", "--compilation-cache", "None")
VERBS = {
    "preview": (preview.main, (*TRAINS, "--data.template", "chat"), "data.template plain"),
    "generate": (
        import_module("jaxft.generate").main,
        ("--model", "MODEL", "--prompt", "x", "--template", "chat"),
        "data.template plain",
    ),
    "evaluate": (evaluate.main, (*MEASURES, "--tasks", "gsm8k", "--chat", "--out", "OUT"), "leave --chat out"),
}


SHOWN = [("preview", "endless"), ("generate", "filling the memory"), ("evaluate", "filling the memory")]
MORE = [pytest.param(v, b, marks=pytest.mark.slow) for v in VERBS for b in BOMBS if (v, b) not in SHOWN]


@pytest.mark.parametrize(("verb", "bomb"), SHOWN + MORE)
def test_a_template_that_is_a_bomb_ends_a_verb_in_one_line(asked, verb, bomb):
    main, words, remedy = VERBS[verb]
    why = "0 s or 224 MB" if bomb == "endless" else "takes more than 224 MB"
    said = asked(main, BOMBS[bomb], *words)
    assert "the chat template refuses turns user" in said and why in said and said.endswith(remedy)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the harness's and its libraries' own
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_that_is_a_bomb_ends_the_harness_too(tmp_path, monkeypatch, bomb):
    pytest.importorskip("lm_eval")
    from jaxft.evals.harness import JaxftLM

    monkeypatch.setattr(conversation, "SANDBOX", Sandbox(cpu_seconds=0.5))
    model = JaxftLM("builtin:tiny", dtype="float32")
    model.tokenizer.chat_template = BOMBS[bomb]
    for goes_on in (False, True):
        with pytest.raises(UserError, match=r"refuses turns user, .*leave apply_chat_template out"):
            model.apply_chat_template(TALK, add_generation_prompt=not goes_on)
    conversation.SANDBOX.close()
