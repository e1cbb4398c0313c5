"""Sequences that are not prose: their segments are those that other programs find."""

import ast
import itertools
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from bipe_jax.data import lines as data_lines
from bipe_jax.data import quickstart
from bipe_jax.errors import UserError
from bipe_jax.modalities import code, dna, games, metamath, music, proofs, registry, writing
from bipe_jax.modalities.documents import Document, Options
from bipe_jax.segments import segmenters

TUNE = """X: 7
T:The Test Reel
Z:somebody
M:4/4
L:1/8
K:G
%%MIDI program 1
D2 | G2 "A|m"B2 d2 B2 | [GB]4 A4 |\\
A,2 !D.C.! B2 c4 :|
|: g4 e4 |1 d8 :|[2 B8 ||
P:coda
e4- | e4 |]
"""
BARS = [
    "T:The Test Reel\n", "M:4/4\n", "L:1/8\n", "K:G\n",
    "D2 | ", 'G2 "A|m"B2 d2 B2 | ', "[GB]4 A4 |\n", "A,2 !D.C.! B2 c4 :|\n",
    "|: g4 e4 |", "1 d8 :|", "[2 B8 ||\n", "P:coda\n", "e4- | ", "e4 |]\n",
]  # fmt: skip
PARTS = ["T:The", "|: g4", "P:coda"]
# Modus ponens, of which two proofs are the same, one compressed, with a step that is used twice.
DATABASE = """
$( Comment $= with $. words. $)
$c |- wff ( ) -> $.  $v p q $.
wp $f wff p $.  wq $f wff q $.
wi $a wff ( p -> q ) $.
${ mp.1 $e |- p $. mp.2 $e |- ( p -> q ) $.
   mp $a |- q $. $}
id $a |- ( p -> p ) $.
${ two.1 $e |- ( ( p -> p ) -> q ) $.
   normal $p |- q $= wp wp wi wq wp id two.1 mp $.
   packed $p |- q $= ( wi id mp ) AADBAECF $. $}
${ k.1 $e |- p $. k.2 $e |- q $. k $a |- ( p -> q ) $. $}
twice $p |- ( ( p -> p ) -> ( p -> p ) ) $= ( wi id k ) AABZEACZFD $.
open $p |- p $= ? $.
"""


def cut(text, begins):
    assert begins == sorted(set(begins)) and begins[0] == 0 and begins[-1] < len(text)
    return [text[a:b] for a, b in zip(begins, [*begins[1:], len(text)], strict=True)]


def test_bars_and_parts_of_a_tune():
    (tune,) = music.tunes("remarks\n\n" + TUNE + "\n")
    assert cut(tune.text, tune.bars) == BARS
    parts = cut(tune.text, tune.parts)
    assert [part[: len(start)] for part, start in zip(parts, PARTS, strict=True)] == PARTS
    assert tune.title == "The Test Reel" and not list(music.tunes("X:1\nT:No music\nK:G\n"))


@pytest.mark.filterwarnings("ignore")
def test_bars_are_music21s_measures():
    abc = pytest.importorskip("music21.abcFormat")

    def notes(tokens):
        return sum(isinstance(token, abc.ABCNote) for token in tokens)

    for folder in music.COLLECTIONS:
        paths = sorted(Path(music.directory(), folder).glob("*.abc"))
        tunes = [tune for path in paths for tune in music.tunes(path.read_text("latin-1"))]
        for tune in tunes[:: len(tunes) // 12]:
            theirs, own = abc.ABCHandler(), []
            theirs.process("X:1\n" + tune.text)
            for bar in cut(tune.text, tune.bars):
                reader = abc.ABCHandler()
                if not re.match("[A-Z]:[^|:]", bar):
                    reader.tokenize(f"X:1\nM:4/4\nK:C\n{bar}\n")
                    own.append(notes(reader.tokens))
            measures = [notes(measure.tokens) for measure in theirs.splitByMeasure()]
            assert [n for n in own if n] == [n for n in measures if n], tune.title


def test_documents_of_tunes_are_whole_tunes_and_no_title_is_on_both_sides():
    pytest.importorskip("music21")
    titles = {True: set(), False: set()}
    for document in music.documents(Options()):
        bars, parts, tunes = document.segments
        assert set(tunes) <= set(parts) <= set(bars)
        for tune in cut(document.text, tunes):
            assert tune.startswith("T:") and tune.endswith("\n\n") and "\nK:" in tune
            plain = music._plain(tune[2:].partition("\n")[0])
            titles[quickstart.is_held_out(document.name)].add(plain)
    assert len(titles[True]) > 200 and not titles[True] & titles[False]


def test_proofs_are_expanded_with_absolute_and_relative_references():
    every = {}
    for theorem, known in metamath.theorems(DATABASE):
        if theorem.label == "open":
            with pytest.raises(ValueError, match="incomplete"):
                metamath.steps(theorem, known)
            continue
        steps = metamath.steps(theorem, known)
        every[theorem.label] = [proofs.document(theorem, steps, kind).text for kind in (0, 1)]
    absolute = (
        "prove |- q\n"
        "1 id |- ( p -> p )\n"
        "2 two.1 |- ( ( p -> p ) -> q )\n"
        "3 1,2 mp |- q\n"
    )  # fmt: skip
    relative = absolute.replace("1,2", "-2,-1")
    assert every["normal"] == every["packed"] == [absolute, relative]
    assert every["twice"][1].splitlines()[1:] == [
        "1 id |- ( p -> p )",
        "2 -1,-1 k |- ( ( p -> p ) -> ( p -> p ) )",
    ]


needs_set_mm = pytest.mark.skipif(
    not Path(proofs.FILE).exists(), reason="needs Debian's metamath-databases"
)


def read_set_mm(count):
    """The first theorems of set.mm with their steps."""
    for theorem, known in metamath.theorems(Path(proofs.FILE).read_text()):
        if theorem.symbols[0] == metamath.PROVABLE:
            yield theorem, known, metamath.steps(theorem, known)
            count -= 1
            if not count:
                return


@needs_set_mm
def test_each_step_follows_from_those_that_it_refers_to():
    """An assertion matches what is proved word by word, with one substitution for all its variables."""

    def matches(pattern, symbols, variables, found):
        if not pattern:
            return [found] if not symbols else []
        head, rest = pattern[0], pattern[1:]
        if head not in variables:
            same = symbols and symbols[0] == head
            return matches(rest, symbols[1:], variables, found) if same else []
        if head in found:
            own = found[head]
            same = symbols[: len(own)] == own
            return matches(rest, symbols[len(own) :], variables, found) if same else []
        ends = range(1, len(symbols) - len(rest) + 1)
        return [
            one
            for end in ends
            for one in matches(rest, symbols[end:], variables, {**found, head: symbols[:end]})
        ]

    for theorem, known, steps in read_set_mm(400):
        assert steps[-1].symbols == theorem.symbols
        for number, step in enumerate(steps, 1):
            used = known.get(step.label)
            variables = {one.symbols[1] for one in used.hypotheses if one.kind == "f"}
            needed = [one for one in used.hypotheses if one.kind == "e"]
            assert len(needed) == len(step.references) and all(r < number for r in step.references)
            if used.kind == "e":
                assert used.symbols == step.symbols and used in theorem.hypotheses
                continue
            ways = matches(used.symbols, step.symbols, variables, {})
            for one, reference in zip(needed, step.references, strict=True):
                given = steps[reference - 1].symbols
                ways = [w for way in ways for w in matches(one.symbols, given, variables, way)]
            assert ways, (theorem.label, number)


@needs_set_mm
@pytest.mark.skipif(shutil.which("metamath") is None, reason="needs Debian's metamath")
def test_steps_are_those_that_metamath_shows():
    """A repeated step is shown again there, by "@" and a number; here it is referred to."""
    chosen = {theorem.label: steps for theorem, _, steps in list(read_set_mm(4000))[::100]}
    shows = [f"show proof {label} /lemmon /renumber" for label in chosen]
    line = ["metamath", f"read {Path(proofs.FILE).name}", "set scroll continuous", "set width 9999"]
    where = Path(proofs.FILE).parent
    done = subprocess.run([*line, *shows, "exit"], cwd=where, capture_output=True, text=True)
    parts = re.split(r"^MM> show proof (\S+) .*\n", done.stdout, flags=re.MULTILINE)[1:]
    assert parts[::2] == list(chosen)
    for label, shown in zip(parts[::2], parts[1::2], strict=True):
        form = r"^ *(\d+) (?:([\d,]+) )?(\S+) +(?:@\d+: )?\$[aep] (.*)$"
        rows = re.findall(form, shown, flags=re.MULTILINE)
        says = {number: symbols for number, _, _, symbols in rows}
        theirs = [
            (used, symbols, [says[number] for number in numbers.split(",") if number])
            for _, numbers, used, symbols in rows
            if used[0] != "@"
        ]
        steps = chosen[label]
        own = [
            (s.label, " ".join(s.symbols), [" ".join(steps[r - 1].symbols) for r in s.references])
            for s in steps
        ]
        assert own == theirs, label


def test_definitions_are_those_of_a_walk_over_the_syntax():
    def visit(node, borders):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                first = min(n.lineno for n in (child, *child.decorator_list))
                borders |= {first - 1, child.end_lineno}
            visit(child, borders)
        return borders

    for document in itertools.islice(code.documents(Options()), 3):
        source = document.text.splitlines(keepends=True)
        borders = sorted(visit(ast.parse(document.text), {0}) - {len(source)})
        assert cut(document.text, document.segments[0]) == source
        assert document.segments[1] == [sum(map(len, source[:border])) for border in borders]
        assert len(borders) > 20


def test_games_are_legal_and_segments_are_pairs_of_moves():
    chess = pytest.importorskip("chess")
    written = list(games.documents(Options(count=12, seed=3, plies=31)))
    assert [d.text for d in written] == [
        d.text for d in games.documents(Options(count=12, seed=3, plies=31))
    ]
    captures = total = 0
    for document in written:
        board, plies = chess.Board(), 0
        for pair in cut(document.text, document.segments[0]):
            assert board.turn == chess.WHITE
            for square, to, piece in re.findall(r"(\w\d) (\w\d)(?: ([qrbn])\b)?", pair):
                move = chess.Move.from_uci(square + to + piece)
                assert board.is_legal(move)
                captures += board.is_capture(move)
                board.push(move)
                plies += 1
        assert set(document.text.split()) <= set(games.WORDS)
        assert quickstart.is_held_out(document.name) or plies <= 31
        total += plies
    assert captures / total > 0.15  # of random moves, about one in ten


def test_letters_follow_the_chain():
    chain = dna.chain(5)
    counts = Counter()
    for document in dna.documents(Options(count=6, seed=5)):
        letters = document.text.split(" ")
        counts += Counter(
            (*letters[i : i + 3], letters[i + 3]) for i in range(len(letters) - dna.ORDER)
        )
        assert not document.segments and len(letters) == dna.LENGTH
    for context, wanted in chain.items():
        own = [counts[(*context, letter)] for letter in dna.LETTERS]
        for count, share in zip(own, wanted, strict=True):
            error = math.sqrt(share * (1 - share) / sum(own))
            assert abs(count / sum(own) - share) < 5 * error + 1e-9


def test_shards_are_read_with_their_segments_and_each_document_is_on_one_side(
    tmp_path, monkeypatch
):
    made = [Document(f"d{i}", f"one {i}\ntwo\n", "s", ((0, len(f"one {i}\n")),)) for i in range(50)]
    modality = registry.MODALITIES["dna"]._replace(documents=lambda options: iter(made))
    monkeypatch.setitem(registry.MODALITIES, "dna", modality)
    described = writing.write("dna", Options(seed=1), str(tmp_path))
    assert json.loads((tmp_path / writing.DESCRIPTION).read_text())["options"] == {"seed": 1}
    read = {}
    for path in tmp_path.glob("*.jsonl"):
        for line in path.read_bytes().splitlines():
            document = data_lines.parse(line)
            assert segmenters.begins("data:0", document) == [0, document["text"].index("two")]
            read[document["text"]] = path.name
        assert described["documents"][path.name] == list(read.values()).count(path.name)
    for one in made:
        assert (read[one.text] == writing.HELD_OUT) == quickstart.is_held_out(one.name)
    with pytest.raises(UserError, match="no option of music: it has none"):
        writing.write("music", Options(seed=1), str(tmp_path))


def test_what_is_not_installed_is_named_in_one_line(monkeypatch, tmp_path, command):
    monkeypatch.setattr(music.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(proofs, "FILE", "/nowhere/set.mm")
    for name, wanted in (
        ("music", "pip install music21"),
        ("chess", "pip install chess"),
        ("proofs", "apt-get install metamath-databases"),
    ):
        with pytest.raises(UserError, match=wanted):
            writing.write(name, Options(), str(tmp_path))
    done = command("modalities", "dna", "--count=40", f"--output={tmp_path}")
    assert done.returncode == 0 and "Licence: none" in done.stdout, done.stderr
    done = command("modalities", "musik", f"--output={tmp_path}")
    assert done.returncode == 1 and "did you mean 'music'" in done.stderr
