# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Segment rules: which tokens end or begin a segment, by name, for one tokenizer.

A *separator* is a token that ends a segment and belongs to it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from bipe_jax import config as configs
from bipe_jax import plugins
from bipe_jax.errors import UserError
from bipe_jax.segments import automaton, segmenters
from bipe_jax.segments.automaton import Automaton
from bipe_jax.suggest import did_you_mean

SEGMENT = "segment"  # the name of the finest level

_NEWLINE = re.compile(r"\n")
# Full stops, exclamation and question marks, perhaps inside closing quotes or brackets.
_SENTENCE_END = re.compile(r"\n|[.!?…。！？]+[\"'”’»)\]]*\s*$")

# Rules by what a token stands for.
_PIECE_RULES: dict[str, Callable[[str], Any]] = {
    "sentence": lambda piece: _SENTENCE_END.search(piece),
    "newline": lambda piece: _NEWLINE.search(piece),
    # What the authors' code does with Llama's tokenizer (ids 13 and 869).
    "newline-and-spaced-period": lambda piece: _NEWLINE.search(piece) or piece == " .",
}
# Rules by the text: (whether a segment begins, not ends, with the token that completes a match, pattern).
_PATTERNS: dict[str, tuple[bool, str]] = {
    # A blank line after some text; further ones belong to the next paragraph.
    "paragraph": (False, r"\S[\s\S]*\n[ \t\r]*\n"),
    # A heading of a book, of Markdown or of LaTeX.
    "chapter": (True, r"\n(CHAPTER|Chapter|PART|BOOK|#|\\chapter|\\section)"),
    # A function or class of Python that is not indented.
    "def": (True, r"\n(async def|def|class|@)"),
}
_DOCUMENT = "document"
_FIXED = re.compile(r"fixed:([1-9][0-9]{0,8})")
_REGEX, _BEFORE = "regex:", "before:"
RULES = (
    *_PIECE_RULES, *_PATTERNS, _DOCUMENT, "fixed:N", "regex:PATTERN", "before:PATTERN",
    *segmenters.NAMES,
)  # fmt: skip
OWN = (*_PIECE_RULES, *_PATTERNS, _DOCUMENT, *segmenters.PLAIN)  # the names without an argument

_OWN_NAMES = (
    "position",
    SEGMENT,
    "offset",
    "tokens",
    "targets",
    "weights",
    "document_ids",
    "starts",
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where segments end or begin, and where those of coarser levels do.

    A segment ends every `length` tokens, if that is above 0; otherwise where `automaton` or
    `separators` say; or it begins where a segmenter has marked the text.

    Attributes:
      separators: token ids, each of which ends a segment.
      length: tokens of every segment, 0 if they differ.
      automaton: that cuts the tokens, if separators do not suffice.
      before: whether segments begin with the tokens that `automaton` cuts at, and do not end with them.
      segmenter: of `segmenters`, "" for none.
      coarser: name -> rule of each coarser level, in ascending order. The end of a coarser one's segment
        ends the finer ones' too.
    """

    separators: tuple[int, ...] = ()
    length: int = 0
    automaton: Automaton | None = None
    before: bool = False
    segmenter: str = ""
    coarser: tuple[tuple[str, "Rule"], ...] = ()

    @property
    def levels(self) -> tuple[tuple[str, "Rule"], ...]:
        """Name -> rule of all levels, the finest first."""
        return (SEGMENT, self), *self.coarser

    @functools.cached_property
    def machine(self) -> Automaton:
        """The automaton, also that of separators."""
        return self.automaton or automaton.of_separators(self.separators)

    def cuts(self, tokens: Any, position: Any, states: Any = 0) -> Any:
        """Whether each token ends its segment or, if `before`, begins one: booleans.

        Args:
          tokens: integers.
          position: integers of the same shape.
          states: of `machine`, before each token.
        """
        if self.length:
            return position % self.length == self.length - 1
        return self.machine.cuts_at(tokens, states)


def check_rule(name: str, key: str = "segments.rule") -> None:
    """Raises UserError unless `name` is one of RULES, or of a plug-in that can be imported."""
    if plugins.find(plugins.RULES, name, OWN):
        return
    pattern = _pattern(name)
    if pattern:
        automaton.of_pattern(pattern[1], ())
    elif segmenters.is_known(name):
        segmenters.check(name, key)
    elif name not in _PIECE_RULES and name != _DOCUMENT and not _FIXED.fullmatch(name):
        known = (*RULES, *plugins.names(plugins.RULES))
        hint = did_you_mean(name.partition(":")[0], [re.split(r"[:\[]", rule)[0] for rule in known])
        raise UserError(f"{key}={name!r} is unknown{hint}: use one of {', '.join(known)}")


def _pattern(name: str) -> tuple[bool, str] | None:
    """A rule by the text: whether segments begin with the match's last token, and its pattern."""
    for prefix in (_REGEX, _BEFORE):
        if name.startswith(prefix):
            return prefix == _BEFORE, name.removeprefix(prefix)
    return _PATTERNS.get(name)


def resolve(
    name: str,
    pieces: Sequence[str],
    bos_id: int = -1,
    levels: Sequence[tuple[str, str]] = (),
) -> Rule:
    """Turns the names of rules into a Rule for one tokenizer.

    Args:
      name: one of RULES, such as "sentence" or "fixed:16".
      pieces: the text that each token id stands for, with plain spaces; "" for control tokens.
      bos_id: the token that documents begin with; -1 if there is none.
      levels: (name, rule) of each coarser level, see `parse_levels`.

    Raises:
      UserError: a rule is unknown, or the tokenizer has no piece that it would cut at.
    """
    coarser = tuple(
        (level, _resolve(rule, pieces, bos_id, number))
        for number, (level, rule) in enumerate(levels, 1)
    )
    return dataclasses.replace(_resolve(name, pieces, bos_id), coarser=coarser)


def rule_of(config: configs.Config, pieces: Sequence[str], bos_id: int) -> Rule:
    """The Rule of a config for one tokenizer. See `resolve`."""
    s = config.segments
    return resolve(s.rule, pieces, bos_id, parse_levels(s.levels))


def segmenters_of(config: configs.Config) -> tuple[str, ...]:
    """The segmenter of each level of a config, "" for none; () if no level has one."""
    s = config.segments
    rules = [s.rule, *(rule for _, rule in parse_levels(s.levels))]
    names = tuple(
        segmenters.of_level(rule, number) if segmenters.is_known(rule) else ""
        for number, rule in enumerate(rules)
    )
    return names if any(names) else ()


def segmenters_of_text(config: configs.Config) -> tuple[str, ...]:
    """`segmenters_of` a config, for text that comes without segments of its own: prompts, and tasks.

    Raises:
      UserError: a level takes its segments from the data.
    """
    names = segmenters_of(config)
    if name := next((name for name in names if name and not segmenters.reads_text(name)), ""):
        raise UserError(
            f"the segment rule {name!r} takes segments from the data, and prompts and tasks have text alone: "
            "use a checkpoint with another rule"
        )
    return names


def _resolve(name: str, pieces: Sequence[str], bos_id: int, level: int = 0) -> Rule:
    if rule := _without_tokenizer(name, level):
        return rule
    if name == _DOCUMENT:
        if bos_id < 0:
            raise UserError(
                "the segment rule 'document' needs a token between documents, and the tokenizer has "
                "neither BOS nor EOS: use another rule"
            )
        return Rule(automaton=automaton.of_separators([bos_id]), before=True)
    if pattern := _pattern(name):
        before, text = pattern
        rule = Rule(automaton=automaton.of_pattern(text, pieces), before=before)
        if not any(map(any, rule.machine.cuts)):
            raise UserError(
                f"the segment rule {name!r} cannot match: none of the tokenizer's {len(pieces)} pieces "
                "completes a match"
            )
        return rule
    if plugin := plugins.find(plugins.RULES, name, OWN):
        rule = plugin.call(pieces, bos_id)
        if not isinstance(rule, Rule):
            plugin.refuse(f"gives a {type(rule).__name__}, and no bipe_jax.segments.Rule")
        return rule
    is_separator = _PIECE_RULES[name]
    separators = tuple(i for i, piece in enumerate(pieces) if is_separator(piece))
    if not separators:
        raise UserError(
            f"segments.rule={name!r} finds no separator among the tokenizer's {len(pieces)} pieces "
            "(no newline or sentence end): use another tokenizer or segments.rule='fixed:N'"
        )
    return Rule(separators=separators)


def _without_tokenizer(name: str, level: int = 0) -> Rule | None:
    check_rule(name)
    if segmenters.is_known(name):
        return Rule(segmenter=segmenters.of_level(name, level))
    fixed = _FIXED.fullmatch(name)
    return Rule(length=int(fixed[1])) if fixed else None


def rule_without_tokenizer(name: str, levels: Sequence[tuple[str, str]] = ()) -> Rule | None:
    """The Rule of names that need no tokenizer, such as "fixed:16"; None if one of them does.

    Raises:
      UserError: a rule is unknown.
    """
    own = _without_tokenizer(name)
    coarser = [(n, _without_tokenizer(rule, i)) for i, (n, rule) in enumerate(levels, 1)]
    if own is None or not all(rule for _, rule in coarser):
        return None
    return dataclasses.replace(own, coarser=tuple((n, rule) for n, rule in coarser if rule))


def parse_levels(levels: Any) -> tuple[tuple[str, str], ...]:
    """(name, rule) of each entry of `segments.levels`, which is a rule, or a pair of a name and a rule.

    A rule alone is the level's name too.

    Raises:
      UserError: an entry is malformed, its rule is unknown, or its name cannot be used.
    """
    parsed: list[tuple[str, str]] = []
    taken: set[str] = set(_OWN_NAMES)
    for entry in levels:
        pair = (entry, entry) if isinstance(entry, str) else entry
        good = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not good or not all(isinstance(part, str) for part in pair):
            raise UserError(
                f"segments.levels: {entry!r} must be a rule, or (name, rule), as in ('def', 'ast')"
            )
        name, rule = pair
        check_rule(rule, "segments.levels: rule")
        if not re.fullmatch(r"[a-z][a-z0-9]{0,30}", name) or name in taken:
            raise UserError(
                f"segments.levels: {entry!r} needs a name of its own, of small letters and digits, as in "
                f"('part', {rule!r})"
            )
        taken.add(name)
        parsed.append((name, rule))
    return tuple(parsed)


def names_of(levels: Sequence[str]) -> tuple[str, ...]:
    """The coordinates of tokens, for the names of all levels, the finest first.

    "position"; of each level its number, the offset in it, and its number in the next coarser level.
    """
    names = ["position"]
    for level, coarser in zip(levels, (*levels[1:], ""), strict=True):
        names += [level, offset_of(level)]
        if coarser:
            names.append(f"{level}_in_{coarser}")
    return tuple(names)


def offset_of(level: str) -> str:
    """The name of the offset in the segments of a level."""
    return "offset" if level == SEGMENT else f"{level}_offset"


def coordinate_names(config: configs.Config) -> tuple[str, ...]:
    """The coordinates that each token has under a config."""
    return names_of((SEGMENT, *(name for name, _ in parse_levels(config.segments.levels))))


def restarts(coordinate: str) -> bool:
    """Whether a coordinate falls back to 0 within a document, as an offset does."""
    return coordinate == "offset" or coordinate.endswith("_offset") or "_in_" in coordinate


def to_json(rule: Rule) -> dict[str, Any]:
    """A rule as JSON has it: what differs from Rule()."""
    saved = {
        field.name: getattr(rule, field.name)
        for field in dataclasses.fields(Rule)
        if getattr(rule, field.name) != field.default
    }
    if rule.automaton:
        saved["automaton"] = dataclasses.asdict(rule.automaton)
    if rule.coarser:
        saved["coarser"] = [[name, to_json(coarser)] for name, coarser in rule.coarser]
    return saved


def from_json(saved: dict[str, Any]) -> Rule:
    """The rule that `to_json` gave.

    Raises:
      KeyError, TypeError, ValueError: it is no such rule.
    """
    values = dict(saved)
    values["separators"] = tuple(map(int, values.get("separators", ())))
    if "automaton" in values:
        parts = values["automaton"]
        values["automaton"] = Automaton(
            *(tuple(tuple(row) for row in parts[name]) for name in ("classes", "next", "cuts"))
        )
    coarser = values.get("coarser", ())
    values["coarser"] = tuple((str(name), from_json(rule)) for name, rule in coarser)
    return Rule(**values)
