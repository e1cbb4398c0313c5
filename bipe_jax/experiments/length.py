"""Pretraining on text: the loss by length, of encodings, halves of BiPE, rules, slopes and levels."""

from typing import Any

from bipe_jax.experiments import text
from bipe_jax.experiments.experiment import Arm, Prediction, crossed, encodings
from bipe_jax.positions import NAMED

_FEW = ("bipe_rope", "rope", "nope")
_MORE = ("bipe_rope", "bipe_alibi", "rope", "alibi", "sinusoidal", "nope")
_WHOLE = "learned offset, rope of segment"  # BiPE-RoPE
_METHOD = (
    "Models that differ in one thing are trained on the same blocks, and score the same held-out tokens "
    "with 1 to 16 times as much context as a block of training (quick: 1 to 4 times)."
)


def _named(size: str) -> list[Arm]:
    names = {"quick": _FEW, "laptop": _MORE, "paper": tuple(NAMED)}[size]
    return encodings(*names)


def _halves(size: str) -> list[Arm]:
    """Each encoding of the offset with each of the segment."""
    intra: dict[str, Any] = {
        "learned offset": (("learned", "offset"),),
        "sinusoidal offset": (("sinusoidal", "offset"),),
        "no offset": (),
    }
    inter: dict[str, Any] = {
        "rope of segment": (("rope", "segment"),),
        "alibi of segment": (("alibi", "segment", ("slope_scale", 96.0)),),
        "t5 of segment": (("t5", "segment"),),
        "no segment": (),
    }
    if size == "quick":
        del intra["sinusoidal offset"], inter["t5 of segment"]
    return crossed(
        [Arm(name, {"position.absolute": entries}) for name, entries in intra.items()],
        [Arm(name, {"position.relative": entries}) for name, entries in inter.items()],
    )


def _rules(size: str) -> list[Arm]:
    """Rules that read the text, and segments of a fixed number of tokens."""
    rules = ["sentence", "newline", "fixed:12"]
    if size != "quick":
        rules += ["newline-and-spaced-period", "paragraph", "fixed:6", "fixed:24"]
    return crossed(
        encodings(*(("bipe_rope",) if size == "quick" else ("bipe_rope", "bipe_alibi"))),
        [Arm(rule, {"segments.rule": rule}) for rule in rules],
    )


def _slopes(size: str) -> list[Arm]:
    scales = (96.0, 12.0) if size == "quick" else (96.0, 6.0, 12.0, 24.0, 48.0, 192.0)
    return [
        Arm(
            f"slopes x {scale:g}",
            {
                "position.absolute": (("learned", "offset"),),
                "position.relative": (("alibi", "segment", ("slope_scale", scale)),),
            },
        )
        for scale in scales
    ]


def _levels(size: str) -> list[Arm]:
    offset, rope = (("learned", "offset"),), (("rope", "segment"),)
    paragraphs = {"segments.levels": ("paragraph",), "position.absolute": offset}
    arms = [
        *encodings("bipe_rope"),
        Arm(
            "rope of sentence in paragraph, alibi of paragraph",
            paragraphs
            | {
                "position.relative": (
                    ("rope", "segment_in_paragraph"),
                    ("alibi", "paragraph", ("slope_scale", 96.0)),
                )
            },
        ),
    ]
    if size != "quick":
        arms += [
            Arm(
                "rope of sentence and alibi of paragraph",
                paragraphs
                | {"position.relative": (*rope, ("alibi", "paragraph", ("slope_scale", 96.0)))},
            ),
            Arm(
                "learned sentence in paragraph, rope of paragraph",
                paragraphs
                | {
                    "position.absolute": (*offset, ("learned", "segment_in_paragraph")),
                    "position.relative": (("rope", "paragraph"),),
                },
            ),
            *encodings("rope", "nope"),
        ]
    return arms


_RIVALS = (
    Prediction(
        "At the training length BiPE-RoPE's loss is at most 0.01 nats above RoPE's, on every set.",
        "the paper: no loss on text of normal length",
        text.lead("bipe_rope", "rope", -0.01, first=True),
    ),
    Prediction(
        "At the longest length BiPE-RoPE's loss is lower than RoPE's, on every set.",
        "the paper; others' runs too (HoPE, Dai et al. 2025, second-hand)",
        text.lead("bipe_rope", "rope", 0.0),
    ),
    Prediction(
        "From the training length to the longest, BiPE-RoPE's loss grows by over 0.1 nats: it is not flat.",
        "second-hand: HoPE's runs have 13.7 at 1x and 66.6 at the longest on PG-19",
        text.growth(("bipe_rope",), lambda nats: nats > 0.1),
    ),
    Prediction(
        "The losses of ALiBi and BiPE-ALiBi grow by at most 0.05 nats.",
        "the paper for BiPE-ALiBi; others' runs for both (TAPE's logs, second-hand)",
        text.growth(("alibi", "bipe_alibi"), lambda nats: nats <= 0.05),
    ),
    Prediction(
        "At the longest length BiPE-ALiBi's loss is lower than ALiBi's, on every set.",
        "the paper (PG-19: 25.2 against 28.6), contested by others' runs",
        text.lead("bipe_alibi", "alibi", 0.0),
    ),
)

EXPERIMENTS = (
    text.experiment(
        "length",
        "Which encodings keep their loss when the context is longer than in training?",
        _METHOD,
        arms=_named,
        predictions=_RIVALS,
    ),
    text.experiment(
        "length-halves",
        "Which half of BiPE does what: the offset in the segment, or the segment's number?",
        _METHOD,
        arms=_halves,
        predictions=(
            Prediction(
                "At the training length both halves help: each alone has a higher loss than both.",
                "ours",
                text.both(
                    text.lead(_WHOLE, "no offset, rope of segment", 0.0, first=True),
                    text.lead(_WHOLE, "learned offset, no segment", 0.0, first=True),
                ),
            ),
            Prediction(
                "Offsets alone grow by at most 0.1 nats to the longest length: they leave no range.",
                "ours",
                text.growth(("learned offset, no segment",), lambda nats: nats <= 0.1),
            ),
        ),
    ),
    text.experiment(
        "length-rules",
        "Must segments follow the text, or is any division as good?",
        _METHOD
        + " fixed:N ends a segment after N tokens, whatever the text is, and is the control.",
        arms=_rules,
        predictions=(
            Prediction(
                "At the training length sentences are better than segments of 12 tokens, by over 0.01 nats.",
                "ours; the paper divides text by its meaning",
                text.lead("bipe_rope, sentence", "bipe_rope, fixed:12", 0.01, first=True),
            ),
            Prediction(
                "At the longest length they are better too.",
                "ours",
                text.lead("bipe_rope, sentence", "bipe_rope, fixed:12", 0.0),
            ),
        ),
    ),
    text.experiment(
        "length-slopes",
        "Which factor do BiPE-ALiBi's slopes need? The authors' code has 96.",
        _METHOD,
        arms=_slopes,
        predictions=(
            Prediction(
                "At the training length slopes times 12, about the tokens of a segment, are better than "
                "times 96: heads see further.",
                "ours",
                text.lead("slopes x 12", "slopes x 96", 0.0, first=True),
            ),
        ),
    ),
    text.experiment(
        "length-levels",
        "Do three levels extrapolate further than two?",
        _METHOD,
        arms=_levels,
        predictions=(
            Prediction(
                "At the longest length sentences counted within paragraphs, with ALiBi of paragraphs, have a "
                "lower loss than BiPE-RoPE: no coordinate of a rotation leaves its range.",
                "ours; the paper sees more levels as the way forward",
                text.lead("rope of sentence in paragraph, alibi of paragraph", "bipe_rope", 0.0),
            ),
        ),
    ),
)
