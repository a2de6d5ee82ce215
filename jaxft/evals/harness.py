"""jaxft as a model of lm-evaluation-harness (extra `eval`): its tasks, prompts and metrics, this project's arithmetic.

`python -m jaxft.evals.harness run --model jaxft --model_args pretrained=NAME,adapter=FOLDER --tasks gsm8k …` is the harness's
own command with this model added. On several processes each runs the same evaluation, and all of it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# First: a registry that holds a model already hides the harness's own (lm-eval 0.4.13).
import lm_eval.models  # noqa: F401
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from jaxft import config
from jaxft.data.chat import load_tokenizer
from jaxft.errors import UserError
from jaxft.evals.decode import Generator, Sampling, eos_ids
from jaxft.evals.score import Request, Scorer
from jaxft.models import decoder
from jaxft.parallel.mesh import make_mesh
from jaxft.weights.model import load_decoder

BATCH_SIZE = 16
SETTINGS = {"do_sample", "temperature", "top_k", "top_p"}  # of generation, beside until and the length


@register_model("jaxft")
class JaxftLM(TemplateLM):
    """A Hub id, local folder or builtin:tiny, with a PEFT adapter on top where given, over all devices."""

    def __init__(
        self,
        pretrained: str,
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
    ):
        """`dtype` is that of weights and activations (auto: the checkpoint's); likelihoods are float32 whatever it is.

        `batch_size` auto is 16. `add_bos_token` None leaves it to the tokenizer. `seed` is that of sampling.
        `max_batch_size` and `device` are what the harness hands to every model: devices are JAX's.
        """
        super().__init__()
        mesh = make_mesh(config.Mesh())
        self.model, folder = load_decoder(pretrained, dtype, adapter, mesh, tokenizer)
        self.tokenizer = load_tokenizer(folder)
        self.batch_size = BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
        self.max_length = max_length or self.model.arch.max_positions
        self.max_gen_toks = 256
        self.add_bos_token, self.seed = add_bos_token, seed
        self._generator = Generator(self.model, eos_ids(self.model, self.tokenizer), self.tokenizer)
        self._scorer = Scorer(self.model, self.batch_size, self.max_length)
        self._origin = pretrained, adapter, dtype

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or EOS where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

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
        """The turns as one text."""
        if self.tokenizer.chat_template is None:
            raise UserError(f"{self._origin[0]}: the tokenizer has no chat template; leave apply_chat_template out")
        options = {
            "add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt,
        }  # fmt: skip
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; None adds what the tokenizer adds by itself, and no second BOS to a text that begins with one."""
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
            if has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        scores = self._scorer([Request(context, continuation) for _, context, continuation in requests])
        answers = [(float(score.log_probability), score.greedy) for score in scores]
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
        scores = [score.log_probability for score in self._scorer(found)]
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
        said = self._generator(prompts, max_new_tokens=new, **options)
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]
        texts = [postprocess_generated_text(text, stop, None) for text in texts]
        each = sampling.samples
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
        pretrained, adapter, dtype = self._origin
        info = {"model": pretrained, "model_dtype": str(self.model.dtype), "dtype_asked": dtype}
        info["model_num_parameters"] = sum(x.size for part in decoder.split(self.model)[1:] for x in part.values())
        if adapter is not None:
            weights = (Path(adapter) / "adapter_model.safetensors").read_bytes()
            info |= {"adapter": str(adapter), "adapter_sha256": hashlib.sha256(weights).hexdigest()}
        return info


def _repeated(requests: Sequence[Any]) -> list[list[int]]:
    """Places of equal requests: the harness hands a task's repeats over as one Instance several times."""
    groups: dict[int, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(id(request), []).append(place)
    return list(groups.values())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
