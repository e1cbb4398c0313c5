# pyright: strict
"""Segments: where they end, at any number of levels, and the coordinates of every token."""

from bipe_jax.segments.coordinates import (
    Coordinates,
    advance,
    coordinates,
    enter,
    is_state,
    start,
    statistics,
)
from bipe_jax.segments.rules import (
    RULES,
    Rule,
    check_rule,
    coordinate_names,
    from_json,
    offset_of,
    parse_levels,
    resolve,
    restarts,
    rule_of,
    rule_without_tokenizer,
    segmenters_of,
    segmenters_of_text,
    to_json,
)

__all__ = [
    "RULES", "Coordinates", "Rule", "advance", "check_rule", "coordinate_names", "coordinates", "enter",
    "from_json", "is_state", "offset_of", "parse_levels", "resolve", "restarts", "rule_of",
    "rule_without_tokenizer", "segmenters_of", "segmenters_of_text", "start", "statistics", "to_json",
]  # fmt: skip
