"""jaxft as a model of lm-evaluation-harness (extra `eval`): its tasks, prompts and metrics, this project's arithmetic.

`python -m jaxft.evals.harness run --model jaxft --model_args pretrained=NAME,adapter=FOLDER --tasks gsm8k …` is the harness's
own command with this model added. On several processes each runs the same evaluation, and all of it.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from typing import Any

# First: a registry that holds a model already hides the harness's own (lm-eval 0.4.13).
import lm_eval.models  # noqa: F401
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from jaxft.data import conversation
from jaxft.errors import UserError
from jaxft.evals.decode import Generator, Sampling, eos_ids
from jaxft.evals.score import Request, Scorer
from jaxft.evals.subject import Subject, open_subject

BATCH_SIZE = 16
SETTINGS = {"do_sample", "temperature", "top_k", "top_p"}  # of generation, beside until and the length


@register_model("jaxft")
class JaxftLM(TemplateLM):
    """A Hub id, local folder or builtin:tiny, with a PEFT adapter on top where given, over all devices."""

    def __init__(
        self,
        pretrained: str | Subject,
        adapter: str | None = None,
        batch_size: int | str = BATCH_SIZE,
        *,
        tokenizer: str | None = None,
        dtype: str = "auto",
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        seed: int = 1234,
        max_batch_size: int | None = None,
        device: str | None = None,
        quantize: str = "none",
        quantize_group: int = 64,
        quantize_double: bool = False,
    ):
        """`dtype` is that of weights and activations (auto: the checkpoint's); likelihoods are float32 whatever it is.

        `pretrained` may be what is loaded already; then `side` says as which of its sides it answers, and may be set
        between tasks. `batch_size` auto is 16. `add_bos_token` None leaves it to the tokenizer. `seed` is that of sampling.
        `quantize` (none, int8, nf4, int4) and what belongs to it are how the base's linear layers are held.
        `max_batch_size` and `device` are what the harness hands to every model: devices are JAX's.
        """
        super().__init__()
        loaded = isinstance(pretrained, Subject)
        held = {"quantize": quantize, "quantize_group": quantize_group, "quantize_double": quantize_double}
        self.subject = pretrained if loaded else open_subject(pretrained, adapter, tokenizer, dtype, **held)
        self.side = next(iter(self.subject.sides))
        self.model, self.tokenizer = self.subject.model, self.subject.tokenizer
        self.batch_size = BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
        self.max_length = max_length or self.model.arch.max_positions
        self.max_gen_toks = 256
        self.add_bos_token, self.seed = add_bos_token, seed
        self.truncated: dict[
            tuple[str, int], bool
        ] = {}  # (task, document) -> cut at the limit, of the last answer to it
        self.generated_tokens = 0
        self._generator = Generator(self.model, eos_ids(self.model, self.tokenizer), self.tokenizer)
        self._scorer = Scorer(self.model, self.batch_size, self.max_length)

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or EOS where there is none."""
        return self.subject.prefix

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The tokenizer's template; its default one where it has several."""
        if chat_template is False or self.tokenizer.chat_template is None:
            return ""
        return self.tokenizer.get_chat_template(chat_template if isinstance(chat_template, str) else None)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The turns as one text, rendered in the sandbox of training's templates and, as there, on one fixed day."""
        if self.tokenizer.chat_template is None:
            name = self.subject.origin["model"]
            raise UserError(f"{name}: the tokenizer has no chat template; leave apply_chat_template out")
        goes_on, remedy = not add_generation_prompt, "leave apply_chat_template out"
        return conversation.prompt(chat_history, self.tokenizer, goes_on=goes_on, remedy=remedy)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; None adds what the tokenizer adds by itself, and no second BOS to a text that begins with one."""
        if add_special_tokens is not None:
            return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return self.subject.encode(string, self.add_bos_token)

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        asked = [Request(context, continuation) for _, context, continuation in requests]
        scores = self._scorer(asked, self._trainable)
        answers = [(float(score.log_probability), score.greedy) for score in scores]
        check_finite([value for value, _ in answers], self.side)
        for (text, _, _), answer in zip(requests, answers):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Σ log p of whole texts, read in windows that do not overlap."""
        found: list[Request] = []
        spans = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            start = len(found)
            found += [Request(*utils.make_disjoint_window(window)) for window in windows]
            spans.append(slice(start, len(found)))
        scores = [score.log_probability for score in self._scorer(found, self._trainable)]
        check_finite(scores, self.side)
        return [sum(scores[span]) for span in spans]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """One text per request, cut before its first stop string; a repeated request draws another sample."""
        answers: list[str] = [""] * len(requests)
        groups: dict[tuple[str, int], list[list[int]]] = {}
        for places in _repeated(requests):
            settings = requests[places[0]].args[1]
            groups.setdefault((json.dumps(settings, sort_keys=True), len(places)), []).append(places)
        for (settings, repeats), alike in groups.items():
            texts = self._generate([requests[places[0]] for places in alike], json.loads(settings), repeats)
            for places, said in zip(alike, texts):
                for place, text in zip(places, said):
                    answers[place] = text
                    self.cache_hook.add_partial("generate_until", requests[place].args, text)
        return answers

    def _generate(self, requests: list[Any], settings: dict[str, Any], repeats: int) -> list[list[str]]:
        """`repeats` texts for each request; all have these settings."""
        settings = normalize_gen_kwargs(copy.deepcopy(settings), self.max_gen_toks)
        new, until = settings.pop("max_gen_toks"), settings.pop("until", None)
        stop = handle_stop_sequences(copy.copy(until), eos=self.tokenizer.decode(self.eot_token_id))
        sampling = self._sampling(settings, repeats)
        room = self.max_length - new
        if room < 1:
            raise UserError(f"max_gen_toks: {new} new tokens leave no room for a prompt in {self.max_length} positions")
        prompts = [self.tok_encode(request.args[0])[-room:] for request in requests]
        documents = [request.doc_id or 0 for request in requests]
        options = {"sampling": sampling, "stop": stop, "batch_size": self.batch_size, "documents": documents}
        said = self._generator(prompts, max_new_tokens=new, trainable=self._trainable, **options)
        whole = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]
        texts = [postprocess_generated_text(text, stop, None) for text in whole]
        each = sampling.samples
        self.generated_tokens += sum(map(len, said))
        for i, request in enumerate(requests):
            ended = len(said[i * each]) < new or texts[i * each] != whole[i * each]
            self.truncated[request.task_name, request.doc_id] = not ended
        return [(texts[i * each : (i + 1) * each] * repeats)[:repeats] for i in range(len(requests))]

    def _sampling(self, settings: dict[str, Any], repeats: int) -> Sampling:
        """Greedy unless the task samples; only what the task names narrows the choice, where transformers adds top_k 50."""
        strange = settings.keys() - SETTINGS
        if strange:
            raise UserError(f"gen_kwargs: {', '.join(sorted(strange))}: not among {', '.join(sorted(SETTINGS))}")
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
        if temperature == 0.0:
            return Sampling(seed=self.seed)
        return Sampling(temperature, settings.get("top_k") or None, settings.get("top_p"), repeats, self.seed)

    def get_model_info(self) -> dict[str, Any]:
        """What was measured, for the results: names, and the digest of the adapter."""
        origin = self.subject.origin
        return {
            "side": self.side,
            "model_num_parameters": origin["parameters"],
            "model_dtype": origin["dtype"],
            **origin,
        }

    @property
    def _trainable(self) -> dict[str, Any]:
        return self.subject.sides[self.side]


def check_finite(scores: Sequence[float], side: str) -> None:
    """Raises UserError where a log-likelihood is no number: to the harness, NaN is the best choice (numpy's argmax), and the
    first one of several, which is always the right one in truthfulqa_mc1."""
    strange = [i for i, score in enumerate(scores) if not math.isfinite(score)]
    if strange:
        raise UserError(
            f"the {side} model gives {scores[strange[0]]} as the log-likelihood of {len(strange):,} of {len(scores):,} "
            "continuations; check its weights, or load it with --dtype float32"
        )


def _repeated(requests: Sequence[Any]) -> list[list[int]]:
    """Places of equal requests: the harness hands a task's repeats over as one Instance several times."""
    groups: dict[int, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(id(request), []).append(place)
    return list(groups.values())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
