"""Shows where a segment rule cuts a text, and how long its segments are:

python -m bipe_jax.data.inspect 'shards/*.jsonl.zst' --tokenizer=FILE.model [--rule=sentence,newline]

Prints blocks with their segments told apart, by colour on a terminal and by ⟦number⟧ everywhere, and a
table; and writes a page (inspection.html) with histograms of every set under every rule. Data is a
source as training takes it, also prepared:DIR, which has its tokenizer with it.
"""

import argparse
import logging
import os
import sys

from bipe_jax import cli, segments
from bipe_jax.config.fields import PACKINGS
from bipe_jax.config.spec import PREPARED, parse_source
from bipe_jax.data import page, prepared, sample, survey
from bipe_jax.data import tokenizer as tokenizers
from bipe_jax.errors import UserError
from bipe_jax.report import text

_LOG = logging.getLogger("bipe_jax.data.inspect")

RULES = ("sentence", "newline", "newline-and-spaced-period")


def rules_of(names: str, pieces: list[str]) -> dict:
    """Name -> `segments.Rule`, of names separated by commas; "" stands for RULES.

    Raises:
      UserError: one is unknown or, if it was named, finds no separator in this tokenizer.
    """
    if names:
        return {name: segments.resolve(name, pieces) for name in names.split(",")}
    found = {}
    for name in RULES:
        try:
            found[name] = segments.resolve(name, pieces)
        except UserError as error:
            _LOG.info(f"Left out: {error}")
    if not found:
        raise UserError(
            "the tokenizer has no piece with a line or sentence end: use --rule=fixed:N"
        )
    return found


def inspect(data: str, tokenizer="", rule="", *, length=128, blocks=2, sets=(), packing="",
            documents=20_000, output="") -> survey.Survey:  # fmt: skip
    """Prints blocks and statistics of a source, and writes the page.

    Args:
      data: a source, see `config.spec`.
      tokenizer: a SentencePiece model's file; "" for prepared data, which has one.
      rule: names of rules, separated by commas; the blocks shown are cut by the first. "": RULES.
      length: tokens of a block shown. blocks: how many of each set. sets: those to keep; () keeps all.
      packing: one of `config.fields.PACKINGS`, "" for "concat" or what the prepared data has.
      documents: that are read, or prepared blocks of each set; 0: all.
      output: the page's file; "" writes none.

    Raises:
      UserError: a wrong input; see the text.
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
    if not os.path.isdir(os.path.dirname(output) or "."):
        raise UserError(f"--output={output}: there is no such directory")
    for name in filter(None, rule.split(",")):
        segments.check_rule(name)
    source = parse_source(data)
    is_prepared = source.kind == PREPARED
    if is_prepared:
        if tokenizer or packing:
            raise UserError(
                f"{data} has a tokenizer and a packing: leave --tokenizer, --packing out"
            )
        prepared.open_prepared(source, sets).close()  # its errors come before the tokenizer's
        tokenizer = os.path.join(source.path, "tokenizer.model")
    elif not tokenizer:
        raise UserError(
            "--tokenizer=FILE.model is needed, a SentencePiece model (a run that trains its own leaves "
            "tokenizer.model in its workdir)"
        )
    model = tokenizers.load(tokenizer)
    rules = rules_of(rule, model.pieces())
    kind = packing or "concat"
    if is_prepared:
        found = survey.of_prepared(source, rules, sets=sets, limit=documents)
    else:
        found = survey.of_text(source, model, rules, sets=sets, kind=kind, limit=documents)
    for name in sets:
        if name not in found.sets:
            _LOG.info(f"There is no document of the set {name!r}")
    shown = {
        (name, rule): sample.samples(
            found.sets[name], rules[rule], model, length=length, count=max(blocks, 1), kind=kind
        )
        for name in found.sets
        for rule in rules
    }
    show(found, shown if blocks else {})
    if output:
        facts = {"Data": data, "Tokenizer": f"{tokenizer}, {model.vocab_size:,} pieces"}
        try:
            with open(output, "w", encoding="utf-8") as file:
                file.write(page.render(found, facts, shown, model.pieces()))
        except OSError as error:
            raise UserError(f"--output={output} cannot be written: {error.strerror}") from None
        print(f"\nWrote {output}")
    return found


def show(found: survey.Survey, blocks: dict) -> None:
    """Prints blocks {(set, rule): list} by the first rule, and what was counted."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    first = next(iter(found.rules))
    for (name, rule), some in blocks.items():
        if rule != first:
            continue
        for i, block in enumerate(some, 1):
            count = int(block.segment[-1]) + 1
            print(
                f"━━ {text.visible(name)}, block {i} of {len(some)}, rule {rule}: "
                f"{len(block.texts)} tokens, {count} segments ━━\n{sample.text_of(block, colour)}\n"
            )
    total = sum(s.tokens for s in found.sets.values())
    print(
        text.table(
            ("set", "documents", "bytes", "tokens", "tokens/byte", "share"),
            [
                (
                    text.visible(name),
                    f"{s.documents:,}",
                    f"{s.text_bytes:,}",
                    f"{s.tokens:,}",
                    f"{s.tokens / max(s.text_bytes, 1):.3f}",
                    f"{s.tokens / total:.1%}",
                )
                for name, s in found.sets.items()
            ],
        )
    )
    print("\nTokens a segment, and segments a block of", found.block)
    print(
        text.table(
            ("set, rule", "segments", "mean", "median", "p99", "max", "a block", "p99", "max"),
            [
                (
                    f"{text.visible(name)}, {rule}",
                    f"{h.total:,}",
                    f"{h.mean:.1f}",
                    *(f"{n:,}" for n in (h.quantile(0.5), h.quantile(0.99), h.max)),
                    f"{b.mean:.1f}" if b.total else "–",
                    *(f"{n:,}" if b.total else "–" for n in (b.quantile(0.99), b.max)),
                )
                for name, s in found.sets.items()
                for rule, h, b in ((r, s.segments[r], s.per_block[r]) for r in found.rules)
            ],
        )
    )
    for line in page.remarks(found):
        print(line)


def main():
    parser = argparse.ArgumentParser(prog="python -m bipe_jax.data.inspect", description=__doc__)
    parser.add_argument("data", help="a source, such as 'texts/*.jsonl.zst', or prepared:DIR")
    parser.add_argument("--tokenizer", default="", help="a SentencePiece .model")
    parser.add_argument(
        "--rule", default="", help=f"{','.join(RULES)}; the first cuts what is shown"
    )
    parser.add_argument("--length", type=int, default=128, help="tokens of a block shown (128)")
    parser.add_argument("--blocks", type=int, default=2, help="blocks shown of each set (2)")
    parser.add_argument("--sets", default="", help="names of sets, separated by | (all)")
    parser.add_argument("--packing", default="", help=f"{' or '.join(PACKINGS)} (concat)")
    parser.add_argument(
        "--documents",
        type=int,
        default=20_000,
        help="documents read, or prepared blocks of each set; 0: all (20000)",
    )
    parser.add_argument("--output", default="inspection.html", help="the page (inspection.html)")
    args = vars(parser.parse_args())
    args["sets"] = tuple(name for name in args["sets"].split("|") if name)
    inspect(**args)


if __name__ == "__main__":
    with cli.user_errors():
        main()
