"""The flags of each command: a function a command, which adds them to a parser."""

from bipe_jax.config.fields import ON_ERROR, PACKINGS
from bipe_jax.flags import Parser, names
from bipe_jax.hardware import cores

# What bipe_jax.convert reads, and a description of it.
INCOMING = {
    "from-authors": "a checkpoint of BiPE's authors",
    "from-llama": "a Llama checkpoint of Hugging Face's",
    "from-hf": "the output of to-hf, perhaps trained further",
}
SHELLS = ("bash", "zsh")
REFERENCES = ("absolute", "relative")  # of the proofs of bipe_jax.modalities
SIZES = ("quick", "laptop", "paper")  # of an experiment


def _checkpoint(parser: Parser) -> None:
    help_text = "a run's workdir, or one step's directory"
    parser.add_argument("--checkpoint", required=True, help=help_text)


def _output(parser: Parser) -> None:
    parser.add_argument("--output", default="", help="directory to write to (--checkpoint)")


def _extend(parser: Parser) -> None:
    parser.add_argument("--extend", default="", help="scale the rotary encoding, such as yarn:8")


def _data(parser: Parser) -> None:
    parser.add_argument("--data", default="", help="such as 'texts/*.jsonl.zst' (the config's)")


def _sets(parser: Parser, default: str) -> None:
    parser.add_argument(
        "--sets", type=names, default=(), help=f"names of sets, separated by | ({default})"
    )


def _runs(parser: Parser, runs: str) -> None:
    parser.add_argument("runs", nargs="+", help=runs)
    parser.add_argument(
        "--names",
        type=names,
        default=(),
        help="of the runs, separated by | (their directories')",
    )


def train(parser: Parser) -> None:
    parser.add_argument(
        "--workdir", required=True, help="directory of the run: checkpoints, metrics, plots"
    )
    parser.add_argument(
        "--stop_at", type=int, help="train to this step, save and exit as if preempted"
    )
    parser.add_argument("--profile", help="steps to trace into WORKDIR/profile, FIRST:LAST")
    parser.add_config()


def evaluate(parser: Parser) -> None:
    _checkpoint(parser)
    parser.add_argument("--lengths", default="", help="such as 256,512,1024 (the config's)")
    _data(parser)
    _sets(parser, "the config's")
    parser.add_argument(
        "--tokens", default="", help="targets a data set, such as 1000000, or all (the config's)"
    )
    parser.add_argument(
        "--context",
        type=int,
        default=0,
        help="the largest length that may score the targets: the same in all that is to be compared "
        "(the config's, or its longest length)",
    )
    parser.add_argument(
        "--protocol",
        default="same-tokens",
        help="same-tokens, non-overlapping or sliding:STRIDE (same-tokens)",
    )
    _extend(parser)
    parser.add_argument(
        "--draws", action="store_true", help="draw coordinates as in training (the true ones)"
    )
    _output(parser)
    parser.add_argument("--follow", action="store_true", help="evaluate each new checkpoint")


def generate(parser: Parser) -> None:
    _checkpoint(parser)
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="(128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: the most probable token (0)"
    )
    parser.add_argument(
        "--top_k", type=int, default=0, help="sample from the k most probable tokens; 0: all (0)"
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="sample from the top tokens with this sum (1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (0)")
    _extend(parser)


def analyse(parser: Parser) -> None:
    _checkpoint(parser)
    parser.add_argument("--lengths", default="", help="such as 256,1024 (1 and 4 times training's)")
    _data(parser)
    _output(parser)
    parser.add_argument("--blocks", type=int, default=16, help="documents at most (16)")


def tasks(parser: Parser) -> None:
    _checkpoint(parser)
    parser.add_argument("--tasks", default="", help="separated by commas (all)")
    parser.add_argument("--lengths", default="", help="tokens (1 … 16 times the training length)")
    parser.add_argument("--depths", default="0,0.25,0.5,0.75,1", help="(0,0.25,0.5,0.75,1)")
    parser.add_argument("--samples", type=int, default=20, help="a cell (20)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (0)")
    parser.add_argument(
        "--haystack", default="", help="a source of text, such as 'texts/*.jsonl.zst' (noise)"
    )
    _extend(parser)
    _output(parser)


def scrolls(parser: Parser) -> None:
    _checkpoint(parser)
    parser.add_argument("--data", required=True, help="the directory of the data sets")
    parser.add_argument("--tasks", default="", help="data sets, separated by commas (all there)")
    parser.add_argument(
        "--split", default="validation", choices=("validation", "test"), help="(validation)"
    )
    parser.add_argument("--tokens", type=int, default=0, help="of a row (the training's)")
    parser.add_argument("--most", type=int, default=0, help="inputs of a data set (all)")
    _output(parser)


def harness(parser: Parser) -> None:
    _checkpoint(parser)
    parser.add_argument("--tasks", required=True, help="names or patterns, such as piqa,arc_*")
    parser.add_argument("--include_path", help="a directory of tasks of your own (YAML)")
    parser.add_argument("--num_fewshot", type=int, help="examples before the question (the task's)")
    parser.add_argument("--limit", type=float, help="examples a task, or a share of them (all)")
    parser.add_argument(
        "--max_length", type=int, default=0, help="tokens of a text (4 times the training's)"
    )
    _extend(parser)
    _output(parser)


def plot(parser: Parser) -> None:
    _runs(parser, "directories that hold an evaluation.json")
    parser.add_argument(
        "--output", default="extrapolation.png", help="the picture to write (extrapolation.png)"
    )
    parser.add_argument("--width", type=float, help="inches (as many as the panels need)")
    parser.add_argument(
        "--ratio", action="store_true", help="lengths in multiples of the training length"
    )


def report(parser: Parser) -> None:
    _runs(parser, "directories of runs that were evaluated")
    parser.add_argument("--output", default="report.html", help="the file to write (report.html)")
    parser.add_argument("--baseline", default="", help="the run that the others are compared with")


def goodput(parser: Parser) -> None:
    parser.add_argument("workdir", help="of a run, which may be running")


def preflight(parser: Parser) -> None:
    parser.add_argument("--topology", help="a slice such as v5e:16x16 (the config's)")
    parser.add_argument(
        "--profile", action="store_true", help="print the instructions that take longest"
    )
    parser.add_argument(
        "--search", action="store_true", help="try meshes, remat and accumulation; print the best"
    )
    parser.add_config()


def prepare(parser: Parser) -> None:
    parser.add_argument("--input", required=True, help="globs of shards, or tfds:NAME[:SPLIT]")
    parser.add_argument("--output", required=True, help="the directory to write")
    parser.add_argument("--tokenizer", required=True, help="a SentencePiece .model")
    parser.add_argument("--length", required=True, type=int, help="the sequence_length to train at")
    parser.add_argument("--packing", default="concat", choices=PACKINGS, help="(concat)")
    parser.add_argument(
        "--segmenters",
        default="",
        help="segment rules that read the text (data, ast, pysbd), one a level, the finest first, separated "
        "by commas; empty for a level by tokens",
    )
    _sets(parser, "all")
    parser.add_argument("--workers", default=0, type=int, help="processes (one a core)")
    parser.add_argument("--on_error", default="raise", choices=ON_ERROR, help="(raise)")
    parser.add_argument(
        "--max_bad_share", default=0.01, type=float, help="of lines, and shards (0.01)"
    )
    parser.add_argument("--runner", default="", help="Apache Beam's; its options may follow")


def inspect(parser: Parser) -> None:
    parser.add_argument("data", help="a source, such as 'texts/*.jsonl.zst', or prepared:DIR")
    parser.add_argument("--tokenizer", default="", help="a SentencePiece .model")
    parser.add_argument(
        "--rule",
        default="",
        help="segment rules, separated by commas; blocks show the first (those by sentences and lines)",
    )
    parser.add_argument(
        "--levels", default="", help="rules of coarser levels, such as paragraph,chapter (none)"
    )
    parser.add_argument("--length", type=int, default=128, help="tokens of a block shown (128)")
    parser.add_argument("--blocks", type=int, default=2, help="blocks shown of each set (2)")
    _sets(parser, "all")
    parser.add_argument("--packing", default="", help=f"{' or '.join(PACKINGS)} (concat)")
    parser.add_argument(
        "--documents",
        type=int,
        default=20_000,
        help="documents read, or prepared blocks of each set; 0: all (20000)",
    )
    parser.add_argument("--output", default="inspection.html", help="the page (inspection.html)")


def experiments(parser: Parser) -> None:
    parser.add_argument("name", help="of an experiment, or list")
    parser.add_argument("--size", default="quick", choices=SIZES, help="(quick)")
    parser.add_argument("--seeds", type=int, default=None, help="number of seeds (the size's)")
    parser.add_argument("--on", default="local", help="local, slurm, gke or sky (local)")
    parser.add_argument("--output", default="", help="directory of the results and all runs")
    parser.add_argument(
        "--samples", type=int, default=None, help="print so many samples of the data and end"
    )
    parser.add_argument(
        "--tables_only",
        action="store_true",
        help="write the files of finished points; train nothing",
    )


def modalities(parser: Parser) -> None:
    parser.add_argument("name", help="music, proofs, code, chess or dna")
    parser.add_argument("--output", required=True, help="directory of the shards")
    parser.add_argument(
        "--count", type=int, default=0, help="of proofs (all), games (2000) or DNA sequences (300)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of games and DNA sequences (0)")
    parser.add_argument(
        "--references",
        default="",
        choices=REFERENCES,
        help="of proofs, to the steps that a step follows from (absolute)",
    )
    parser.add_argument(
        "--plies", type=int, default=0, help="at most, of a game to train on (60); others are whole"
    )


def places(parser: Parser) -> None:
    _checkpoint(parser)
    _data(parser)
    _output(parser)


def questions(parser: Parser) -> None:
    parser.add_argument("--input", required=True, help="a source of text, such as quickstart:train")
    parser.add_argument("--output", required=True, help="the file to write, .jsonl or .jsonl.gz")
    parser.add_argument(
        "--ask", default="line", help="some of line, back, before, key, passkey, by commas (line)"
    )
    parser.add_argument("--unit", default="line", choices=("line", "sentence"), help="(line)")
    parser.add_argument("--lines", default="4:16", help="of a passage, or sentences (4:16)")
    parser.add_argument(
        "--k", default="1:65536", help="numbers of lines that are asked for (1:65536)"
    )
    parser.add_argument(
        "--width", type=int, default=80, help="most characters a line, on average (80)"
    )
    parser.add_argument("--count", type=int, default=1000, help="examples of each question (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (0)")


def reframe(parser: Parser) -> None:
    parser.add_argument("--input", required=True, help="globs of shards, separated by commas")
    parser.add_argument("--output", required=True, help="a directory")
    parser.add_argument("--frame_mb", type=float, default=4, help="MB of text per frame (4)")
    parser.add_argument("--shards", type=int, default=0, help="distribute lines over N files")
    parser.add_argument("--level", type=int, default=3, help="of zstd (3)")
    parser.add_argument("--workers", type=int, default=cores(), help="threads (one per core)")


def checkpoints(parser: Parser) -> None:
    parser.add_argument("verb", choices=["verify"], help="verify")
    parser.add_argument("path", help="a run's workdir, or one step's directory")


def convert(parser: Parser) -> None:
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, source in INCOMING.items():
        command = commands.add_parser(name, help=f"{source} -> a checkpoint of ours")
        command.add_argument("source", help=f"{source}: a directory with config.json and tensors")
        command.add_argument("destination", help="a workdir without checkpoints")
        command.add_argument("--tokenizer", default="", help="a SentencePiece file (the source's)")
    command = commands.add_parser("to-hf", help="a checkpoint of ours -> for transformers")
    command.add_argument("source", help="a workdir (its latest checkpoint) or one step's directory")
    command.add_argument("destination", help="a directory that does not exist, or is empty")


def completion(parser: Parser) -> None:
    parser.add_argument("shell", choices=SHELLS, help=" or ".join(SHELLS))
