"""Writes tiny random Keras presets and what Keras itself makes of them: `python keras_presets.py FOLDER`.

A program of its own, because Keras does not survive the suite's strict settings, and one for all, because it imports slowly.
Per case: FOLDER/CASE is the preset, FOLDER/CASE.npy its float32 logits for IDS; facts.json holds the rest.
"""

import io
import json
import sys
from pathlib import Path

import numpy as np

VOCABULARY, LENGTH, WINDOW = 400, 24, 5
IDS = np.random.default_rng(0).integers(3, VOCABULARY, (2, LENGTH), dtype=np.int32)
SIZES = dict(
    vocabulary_size=VOCABULARY, num_layers=3, num_query_heads=4, num_key_value_heads=2, hidden_dim=32, intermediate_dim=48,
)  # fmt: skip
GEMMA = dict(SIZES, head_dim=12)  # not D / N
# Caps below the spread of what they cap, a window below the length, and an odd number of layers.
GEMMA2 = dict(
    GEMMA, use_post_ffw_norm=True, use_post_attention_norm=True, attention_logit_soft_cap=0.7, final_logit_soft_cap=1.5,
    use_sliding_window_attention=True, sliding_window_size=WINDOW,
)  # fmt: skip
SCALED = dict(
    rope_frequency_adjustment_factor=8.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0,
    rope_pretraining_sequence_length=12, rope_max_wavelength=500.0,
)  # fmt: skip
CASES = {
    "gemma": ("Gemma", dict(GEMMA, num_key_value_heads=1)),
    "gemma2": ("Gemma", GEMMA2),
    "gemma2 scaled by D over N": ("Gemma", dict(GEMMA2, query_head_dim_normalize=False)),
    "gemma2 without caps and windows": (
        "Gemma",
        dict(GEMMA, use_post_ffw_norm=True, use_post_attention_norm=True),
    ),
    "llama3": ("Llama3", dict(SIZES, layer_norm_epsilon=0.1)),
    "llama3 with adjusted frequencies": ("Llama3", dict(SIZES, **SCALED)),
    "llama3 tied": ("Llama3", dict(SIZES, tie_word_embeddings=True)),
    "qwen": ("Qwen", dict(SIZES, rope_max_wavelength=300.0)),
    "qwen untied, long rope": ("Qwen", dict(SIZES, tie_word_embeddings=False, rope_scaling_factor=3.0)),
    "qwen with a window": ("Qwen", dict(SIZES, use_sliding_window_attention=True, sliding_window_size=WINDOW)),
    "bfloat16 in shards": ("Gemma", dict(GEMMA2, dtype="bfloat16")),
    "merged from Keras' LoRA": ("Gemma", GEMMA),
}
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind.",
    "She sold 48 clips in April, and then half as many in May: how many altogether?",
    "Zoe has 12 apples. Tom gives Zoe 5 more. How many apples does Zoe have now?",
    "def add(left, right):\n    return left + right\n\n",
    "It's a café in Zürich; they'd paid $3.50 (or 1234567 yen) for it.",
]
TEXTS = [
    *CORPUS, " leading  and   many    spaces ", "\n\n\ttabs\tand\r\nlines\n\n\n", "naïve 東京 🙂 ½", "a", "A1b22c333d4444",
    "don't DON'T you'll", "…", "wordwithoutanyspaceatall", "x=1;y=2//z",
]  # fmt: skip
TURNS = {
    "Gemma": "<start_of_turn>user\nHow many?<end_of_turn>\n",
    "Llama3": "<|start_header_id|>user<|end_header_id|>\n\nHow many?<|eot_id|>",
    "Qwen": "<|im_start|>user\nHow many?<|im_end|>\n",
}
UNKNOWN = ["gemma2_3b_en", "llama3.3_1b", "qwen9", "bert_base_en"]


def fill(backbone, name):
    """Values that tell: kernels that keep the spread of what they transform, norms away from identity, biases from 0."""
    rng = np.random.default_rng(1)
    for variable in backbone.weights:
        kind, shape = variable.path.rpartition("/")[2], tuple(variable.shape)
        std, mean = SIZES["hidden_dim"] ** -0.5, 0.0
        if kind == "scale":
            std, mean = 0.3, 0.0 if name == "Gemma" else 1.0
        elif kind == "bias" or (kind == "embeddings" and name != "Gemma"):
            std = 0.7
        if not kind.startswith("seed"):
            variable.assign(rng.normal(mean, std, shape).astype(np.float32))


def logits(backbone):
    """`[B,S,V]` as Keras' CausalLM forms them."""
    hidden = backbone({"token_ids": IDS, "padding_mask": np.ones_like(IDS)})
    return np.asarray(backbone.token_embedding(hidden, reverse=True), np.float32)


def sentencepiece_tokenizer(models, **options):
    """Trained as Gemma's: byte fallback, digits apart, and the text left as it is."""
    import sentencepiece

    written = io.BytesIO()
    settings = dict(
        model_type="bpe", vocab_size=VOCABULARY - 40, byte_fallback=True, split_digits=True, num_threads=1, minloglevel=2,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", bos_piece="<bos>", eos_piece="<eos>",
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n\n", "▁▁", "▁▁▁"],
    )  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, **(settings | options)
    )
    return models.GemmaTokenizer(proto=written.getvalue())


def byte_pair_tokenizer(cls, special, **options):
    """Merges learnt from CORPUS over all bytes and no two digits, with `special` tokens after them."""
    import tokenizers

    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = [tokenizers.pre_tokenizers.Digits(individual_digits=True), mended_words()]
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(words)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=VOCABULARY - 30, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = model["vocab"] | {token: len(model["vocab"]) + i for i, token in enumerate(special)}
    made = cls(vocabulary=vocabulary, merges=[" ".join(pair) for pair in model["merges"]], **options)
    made._tokenizer.pre_tokenizer = mended_words()
    return made


def mended_words():
    """How Keras says that it parts words; it hands its pattern to `Split` as a literal, which parts nothing."""
    from keras_hub.src.tokenizers.byte_pair_tokenizer import SPLIT_PATTERN_TOKENIZERS
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN_TOKENIZERS), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def tokenizers_of(models):
    """One per family, by its name."""
    llama = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    qwen = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return {
        "Gemma": sentencepiece_tokenizer(models),
        "Llama3": byte_pair_tokenizer(models.Llama3Tokenizer, llama),
        "Qwen": byte_pair_tokenizer(models.QwenTokenizer, qwen, unsplittable_tokens=qwen),
    }


def make(case, name, settings, models, tokenizer, out):
    """One preset and its logits."""
    backbone = getattr(models, f"{name}Backbone")(**settings)
    fill(backbone, name)
    if "LoRA" in case:
        backbone.enable_lora(4)
        fill(backbone, name)
    if not settings.get("query_head_dim_normalize", True):
        # Keras' block drops this setting; what the attention would do with it is what the released 27B does.
        for layer in backbone.transformer_layers:
            layer.attention.query_head_dim_normalize = False
    backbone.save_to_preset(str(out / case), **({"max_shard_size": 6e-5} if "shards" in case else {}))
    tokenizer.save_to_preset(str(out / case))
    if settings.get("dtype") == "bfloat16":
        backbone = models.Backbone.from_preset(str(out / case), dtype="float32")  # its weights, computed in fp32
    np.save(out / f"{case}.npy", logits(backbone))


def tokens(tokenizer, preprocessor, texts):
    """`[ids alone, ids as the model gets them, ids back to text]` of each text."""
    found = []
    for text in texts:
        ids = [int(i) for i in np.asarray(tokenizer(text))]
        ready = preprocessor.generate_preprocess(text)
        kept = np.asarray(ready["token_ids"])[np.asarray(ready["padding_mask"]).astype(bool)]
        found.append([ids, kept.tolist(), str(tokenizer.detokenize(ids))])
    return found


def lookups(folder):
    """What jaxft says of names, and what it asks of Kaggle for a built-in one, which `folder` stands for."""
    import kagglehub
    import requests

    from jaxft.errors import UserError
    from jaxft.weights import keras

    asked, facts = [], {}

    def download(handle, path=None):
        asked.append([handle, path])
        return str(folder / path) if path else str(folder)

    def say(name):
        try:
            return sorted(keras.open_preset(name).files)
        except UserError as error:
            return str(error)

    for name in UNKNOWN:
        facts[name] = say(f"keras:{name}")
    kagglehub.model_download = download
    facts["found"], facts["asked"] = say("keras:gemma2_2b_en"), asked
    for status in (403, 404):
        answer = requests.Response()
        answer.status_code = status
        kagglehub.model_download = failing(kagglehub.exceptions.KaggleApiHTTPError(f"{status} no", response=answer))
        facts[str(status)] = say("keras:kaggle://keras/gemma2/keras/gemma2_2b_en")
    kagglehub.model_download = failing(requests.ConnectionError("no network"))
    facts["offline"] = say("keras:gemma2_2b_en")
    return facts


def failing(error):
    def fail(handle, path=None):
        raise error

    return fail


def main(out):
    import keras_hub

    models, facts = keras_hub.models, {"tokens": {}}
    # The fused kernel that Keras prefers on JAX ignores Qwen's window; its own attention does not.
    sys.modules["keras_hub.src.models.qwen.qwen_attention"].fused_attention_op_available = lambda: False
    tokenizers = tokenizers_of(models)
    for case, (name, settings) in CASES.items():
        make(case, name, settings, models, tokenizers[name], out)
    for name, tokenizer in tokenizers.items():
        preprocessor = getattr(models, f"{name}CausalLMPreprocessor")(tokenizer, sequence_length=256)
        facts["tokens"][name] = tokens(tokenizer, preprocessor, [*TEXTS, TURNS[name]])
    backbone = models.GemmaBackbone(**dict(GEMMA, num_layers=1, num_key_value_heads=4))
    backbone.quantize("int8")
    backbone.save_to_preset(str(out / "int8"))
    tokenizers["Gemma"].save_to_preset(str(out / "int8"))
    sentencepiece_tokenizer(models, model_type="unigram", vocab_size=330).save_to_preset(str(out / "unigram"))
    sentencepiece_tokenizer(models, add_dummy_prefix=True).save_to_preset(str(out / "prefix"))
    facts["lookups"] = lookups(out / "gemma2")
    (out / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
