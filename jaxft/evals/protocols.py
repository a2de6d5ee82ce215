"""GSM8K as lm-evaluation-harness 0.4.13 asks and grades it: prompts byte for byte, shots drawn alike, the same filters."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.analysis.gsm8k.answers import (
    COT_STRICT,
    COT_VOTE,
    FLEXIBLE,
    INVALID,
    STRICT,
    Extractor,
    exact_match,
    same_number,
)
from jaxft.analysis.statistics import standard_error, wilson
from jaxft.errors import UserError

SHOT_SEED = 1234
SHOT_END = "\n\n"
MAX_NEW_TOKENS = 256  # the harness's default, which all of these tasks keep

# The exemplars of Wei et al. 2022 (arXiv 2201.11903, appendix G), as the harness words them.
EXEMPLARS = (
    (
        "There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they are done, there "
        "will be 21 trees. How many trees did the grove workers plant today?",
        "There are 15 trees originally. Then there were 21 trees after some more were planted. So there must have been "
        "21 - 15 = 6. The answer is 6.",
    ),
    (
        "If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the parking lot?",
        "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. The answer is 5.",
    ),
    (
        "Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they have left in total?",
        "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. After eating 35, they "
        "had 74 - 35 = 39. The answer is 39.",
    ),
    (
        "Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How many lollipops did Jason "
        "give to Denny?",
        "Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave Denny 20 - 12 = 8. The "
        "answer is 8.",
    ),
    (
        "Shawn has five toys. For Christmas, he got two toys each from his mom and dad. How many toys does he have now?",
        "Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then that is 4 more toys. 5 + 4 = 9. The "
        "answer is 9.",
    ),
    (
        "There were nine computers in the server room. Five more computers were installed each day, from monday to "
        "thursday. How many computers are now in the server room?",
        "There were originally 9 computers. For each of 4 days, 5 more computers were added. So 5 * 4 = 20 computers were "
        "added. 9 + 20 is 29. The answer is 29.",
    ),
    (
        "Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he lost 2 more. How many golf balls "
        "did he have at the end of wednesday?",
        "Michael started with 58 golf balls. After losing 23 on tuesday, he had 58 - 23 = 35. After losing 2 more, he had "
        "35 - 2 = 33 golf balls. The answer is 33.",
    ),
    (
        "Olivia has $23. She bought five bagels for $3 each. How much money does she have left?",
        "Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has 23 - 15 dollars left. "
        "23 - 15 is 8. The answer is 8.",
    ),
)


@dataclass(frozen=True)
class Protocol:
    """One way to ask GSM8K: the prompt is shots, `before`, the question, `after`, and ends without a space.

    `version` is the harness's task version. `shots` are drawn anew for every document from the training rows, unless
    `exemplars` gives them. `stops` end an answer wherever they occur. `ending` tells a model, in self-refinement, how
    its answer must end.
    """

    name: str
    version: int
    before: str
    after: str
    shots: int
    extractors: tuple[Extractor, ...]
    stops: tuple[str, ...]
    ending: str
    exemplars: tuple[tuple[str, str], ...] = ()
    number_only: bool = False
    """Whether the reference is the number after `####` alone; graded alike."""
    temperature: float = 0.0
    repeats: int = 1


_COT = dict(before="Q: ", after="\nA:", stops=("Q:", "</s>", "<|im_end|>"), ending="`The answer is N.`")
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("gsm8k", 3, "Question: ", "\nAnswer:", 5, (STRICT, FLEXIBLE), ("Question:", "</s>", "<|im_end|>"),
                 "`#### N`"),
        Protocol("gsm8k_cot", 3, shots=8, extractors=(COT_STRICT, FLEXIBLE), exemplars=EXEMPLARS, number_only=True, **_COT),
        Protocol("gsm8k_cot_zeroshot", 3, shots=0, extractors=(COT_STRICT, FLEXIBLE),
                 **_COT | {"after": "\nA: Let's think step by step."}),
        Protocol("gsm8k_cot_self_consistency", 2, shots=8, extractors=(COT_VOTE,), exemplars=EXEMPLARS, number_only=True,
                 temperature=0.2, repeats=64, **_COT | {"stops": ("Q:", "\n\n")}),
    )
}  # fmt: skip


def prompts(
    protocol: Protocol,
    rows: Sequence[Mapping[str, str]],
    *,
    pool: Sequence[Mapping[str, str]] = (),
    shots: int | None = None,
) -> list[str]:
    """The prompt of each row (`question`, `answer`), in order; `shots` replaces the protocol's own number.

    Drawn shots come from `pool`, the training rows, by one Random(1234) for all rows: the same document gets other shots
    in another order or subset, so that only runs over the same rows in the same order compare.
    """
    return [
        "".join([*(f"{q} {a}{SHOT_END}" for q, a in shown), asked])
        for shown, asked in _asked(protocol, rows, pool, shots)
    ]


def conversations(
    protocol: Protocol,
    rows: Sequence[Mapping[str, str]],
    *,
    pool: Sequence[Mapping[str, str]] = (),
    shots: int | None = None,
) -> list[list[dict[str, str]]]:
    """The same as messages for a chat template: each shot is a turn of the user's and one of the assistant's."""
    found = []
    for shown, asked in _asked(protocol, rows, pool, shots):
        turns = [turn for q, a in shown for turn in (("user", q), ("assistant", a))]
        found.append([{"role": role, "content": content} for role, content in [*turns, ("user", asked)]])
    return found


def _asked(
    protocol: Protocol, rows: Sequence[Mapping[str, str]], pool: Sequence[Mapping[str, str]], shots: int | None
) -> Iterator[tuple[list[tuple[str, str]], str]]:
    """For each row its shots, as questions and answers, and its own question, as they are worded."""
    count = protocol.shots if shots is None else shots
    source = protocol.exemplars or [(row["question"], row["answer"]) for row in pool]
    if not 0 <= count <= len(source):
        raise UserError(f"{protocol.name}: {count} shots asked for, {len(source)} rows to take them from")
    draw = random.Random(SHOT_SEED)
    for row in rows:
        chosen = source[:count] if protocol.exemplars else [source[i] for i in draw.sample(range(len(source)), count)]
        shown = [(f"{protocol.before}{q}{protocol.after}", a) for q, a in chosen]
        yield shown, f"{protocol.before}{row['question']}{protocol.after}"


def reference(protocol: Protocol, row: Mapping[str, str]) -> str:
    """What an answer is compared with."""
    return row["answer"].split("####")[-1].strip() if protocol.number_only else row["answer"]


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` before the first stop, for each stop in order, empty ones apart; nothing is stripped."""
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text


@dataclass(frozen=True)
class Grade:
    """How one extractor of a protocol grades all documents.

    `exact_match` is the share of documents whose extracted answer equals the reference as text, with its 95 % Wilson
    interval and the harness's standard error; `equal_number` is the share that equals it as a number (not a figure of
    the harness). `invalid` is the share in which the extractor found nothing; they count as wrong.
    """

    protocol: str
    extractor: str
    problems: int
    exact_match: float
    exact_match_interval: tuple[float, float]
    exact_match_stderr: float
    equal_number: float
    invalid: float
    truncated: float | None
    """The share cut at the limit of new tokens; None where nobody looked."""
    right: tuple[bool, ...]
    found: tuple[str, ...]


def grade(
    protocol: Protocol,
    rows: Sequence[Mapping[str, str]],
    outputs: Sequence[str],
    truncated: Sequence[bool] | None = None,
) -> list[Grade]:
    """Grades one output per row, already `cut`, by each of the protocol's extractors."""
    if len(outputs) != len(rows):
        raise UserError(f"{protocol.name}: {len(rows)} rows, but {len(outputs)} outputs")
    references = [reference(protocol, row) for row in rows]
    grades, n = [], max(1, len(rows))
    for extract in protocol.extractors:
        found = tuple(map(extract, outputs))
        right = tuple(map(exact_match, found, references))
        grades.append(
            Grade(
                protocol=protocol.name,
                extractor=extract.name,
                problems=len(rows),
                exact_match=sum(right) / n,
                exact_match_interval=wilson(sum(right), len(rows)),
                exact_match_stderr=standard_error(right),
                equal_number=sum(map(same_number, found, references)) / n,
                invalid=found.count(INVALID) / n,
                truncated=None if truncated is None else sum(truncated) / n,
                right=right,
                found=found,
            )
        )
    return grades


def refinement_prompts(protocol: Protocol, asked: Sequence[str], first: Sequence[str]) -> list[str]:
    """The second pass of self-refinement: the prompt, the first answer, and a fixed request to check it.

    No task of the harness. Both passes are graded by the same extractors; what the second one changed is
    `comparison.compare(first right, second right)`.
    """
    asking = f"\n\n{check_request(protocol)}\n\nChecked solution:"
    return [f"{prompt} {answer.strip()}{asking}" for prompt, answer in zip(asked, first, strict=True)]


def check_request(protocol: Protocol) -> str:
    """What self-refinement asks for after the first answer."""
    return (
        "Check every step of the solution above. If a step is wrong, correct it. Then write the whole solution "
        f"again, ending with {protocol.ending}"
    )


def described(protocol: Protocol, shots: int | None = None) -> dict[str, Any]:
    """The protocol in words and numbers, to be printed beside its scores."""
    count = protocol.shots if shots is None else shots
    drawn = "fixed" if protocol.exemplars else f"drawn per document with Random({SHOT_SEED})"
    return {
        "protocol": f"lm-evaluation-harness 0.4.13 {protocol.name}, version {protocol.version}",
        "shots": f"{count}, {drawn}" if count else "0",
        "decoding": "greedy" if not protocol.temperature else f"temperature {protocol.temperature}, top_p 1, no top_k",
        "max_new_tokens": MAX_NEW_TOKENS,
        "stops": list(protocol.stops),
        "repeats": protocol.repeats,
    }
