"""Shows the segments of a text under segment rules, and their lengths.

python -m bipe_jax.data.inspect 'shards/*.jsonl.zst' --tokenizer=FILE.model [--rule=sentence,newline]

Prints blocks with their segments, marked by ⟦number⟧ and by colour on a terminal, and a table. Writes a
page (inspection.html) with histograms of every set under every rule. The data is a source as of
training, also prepared:DIR, which contains its tokenizer.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence

from bipe_jax import cli, commands, segments
from bipe_jax.config.fields import PACKINGS
from bipe_jax.config.spec import PREPARED, parse_source
from bipe_jax.data import page, prepared, sample, survey
from bipe_jax.data import tokenizer as tokenizers
from bipe_jax.errors import UserError
from bipe_jax.report import text, webpage
from bipe_jax.workdir import outputs

_LOG = logging.getLogger("bipe_jax.data.inspect")

RULES = ("sentence", "newline", "newline-and-spaced-period")


def names_of(text: str) -> list[str]:
    """Names of rules, separated by commas; a pattern, which may have some, is a name alone."""
    if text.startswith(("regex:", "before:")):
        return [text]
    return text.split(",") if text else []


def rules_of(
    names: str, pieces: list[str], levels: str = "", bos_id: int = -1
) -> dict[str, segments.Rule]:
    """Name -> rule, for rules and for coarser levels, which end the segments of all rules.

    Args:
      names: of rules; "" means those of RULES that have separators. levels: rules, in ascending order.
      pieces, bos_id: of the tokenizer, see `segments.resolve`.

    Raises:
      UserError: a rule is unknown or has no separator in this tokenizer.
    """
    parsed = segments.parse_levels(names_of(levels))

    def resolved(name):
        return segments.resolve(name, pieces, bos_id, parsed)

    rules = {name: resolved(name) for name in names_of(names)}
    for name in () if names else RULES:
        try:
            rules[name] = resolved(name)
        except UserError as error:
            _LOG.info(f"Left out: {error}")
    if not rules:
        raise UserError(
            "the tokenizer has no piece with a line or sentence end: use --rule=fixed:N"
        )
    coarser = next(iter(rules.values())).coarser
    for number, (name, rule) in enumerate(coarser):
        rules[f"level {name}"] = dataclasses.replace(rule, coarser=coarser[number + 1 :])
    return rules


def inspect(data: str, tokenizer: str = "", rule: str = "", *, levels: str = "",
            length: int = 128, blocks: int = 2, sets: Sequence[str] = (), packing: str = "",
            documents: int = 20_000, output: str = "") -> survey.Survey:  # fmt: skip
    """Prints blocks and statistics of a source, and writes the page.

    Args:
      data: a source, see `config.spec`.
      tokenizer: the file of a SentencePiece model; "" for prepared data, which contains it.
      rule: names of rules, separated by commas; the first is that of the blocks shown. "": RULES.
      levels: rules of coarser levels, separated by commas, in ascending order.
      length: tokens of a block shown. blocks: number shown of each set. sets: to keep; () keeps all.
      packing: one of `config.fields.PACKINGS`; "" is "concat", or that of the prepared data.
      documents: number to read, or of prepared blocks of each set; 0: all.
      output: file of the page; "" writes none.

    Returns:
      The statistics.

    Raises:
      UserError: an argument or the source is wrong.
    """
    for name, value, low in (
        ("length", length, 1),
        ("blocks", blocks, 0),
        ("documents", documents, 0),
    ):
        if value < low:
            raise UserError(f"--{name}={value} must be at least {low}")
    if packing and packing not in PACKINGS:
        raise UserError(f"--packing={packing!r} must be {' or '.join(PACKINGS)}")
    if output:
        outputs.check(output)
    for name in names_of(rule):
        segments.check_rule(name)
    segments.parse_levels(names_of(levels))
    source = parse_source(data)
    is_prepared = source.kind == PREPARED
    if is_prepared:
        if tokenizer or packing:
            raise UserError(
                f"{data} has a tokenizer and a packing: leave --tokenizer, --packing out"
            )
        prepared.open_prepared(source, sets).close()  # raises before the tokenizer is read
        tokenizer = os.path.join(source.path, "tokenizer.model")
    elif not tokenizer:
        raise UserError(
            "--tokenizer=FILE.model is needed, a SentencePiece model (a run that trains its own leaves "
            "tokenizer.model in its workdir)"
        )
    model = tokenizers.load(tokenizer)
    rules = rules_of(rule, model.pieces(), levels, model.bos_id)
    kind = packing or "concat"
    if is_prepared:
        result = survey.of_prepared(source, rules, sets=sets, limit=documents)
    else:
        result = survey.of_text(source, model, rules, sets=sets, kind=kind, limit=documents)
    for name in sets:
        if name not in result.sets:
            _LOG.info(f"There is no document of the set {name!r}")
    shown = {
        (name, rule): sample.samples(
            result.sets[name], rules[rule], model, length=length, count=max(blocks, 1), kind=kind
        )
        for name in result.sets
        for rule in rules
    }
    show(result, shown if blocks else {})
    if output:
        facts = {"Data": data, "Tokenizer": f"{tokenizer}, {model.vocab_size:,} pieces"}
        webpage.write(page.render(result, facts, shown, model.pieces()), output)
        print(f"\nWrote {output}")
    return result


def show(result: survey.Survey, blocks: dict) -> None:
    """Prints the blocks {(set, rule): list} of the first rule, and the statistics."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    first = next(iter(result.rules))
    for (name, rule), of_set in blocks.items():
        if rule != first:
            continue
        for i, block in enumerate(of_set, 1):
            count = int(block.segment[-1]) + 1
            print(
                f"━━ {text.line(name)}, block {i} of {len(of_set)}, rule {rule}: "
                f"{len(block.texts)} tokens, {count} segments ━━\n{sample.text_of(block, colour)}\n"
            )
    print(
        text.table(
            ("set", "documents", "bytes", "tokens", "tokens/byte", "share"),
            [(name, *cells) for name, *cells in page.rows_of_sets(result)],
        )
    )
    print("\nTokens a segment, and segments a block of", result.block)
    print(
        text.table(
            ("set, rule", "segments", "mean", "median", "p99", "max", "a block", "p99", "max"),
            [
                (
                    f"{name}, {rule}",
                    f"{h.total:,}",
                    f"{h.mean:.1f}",
                    *(f"{n:,}" for n in (h.quantile(0.5), h.quantile(0.99), h.max)),
                    f"{b.mean:.1f}" if b.total else "–",
                    *(f"{n:,}" if b.total else "–" for n in (b.quantile(0.99), b.max)),
                )
                for name, s in result.sets.items()
                for rule, h, b in ((r, s.segments[r], s.per_block[r]) for r in result.rules)
            ],
        )
    )
    for line in page.remarks(result):
        print(line)


def main():
    inspect(**vars(commands.parser("inspect").parse_args()))


if __name__ == "__main__":
    with cli.user_errors():
        main()
