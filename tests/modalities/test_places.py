"""Places that a model continues rightly or wrongly, counted on known predictions."""

import json
import random

import jax
import numpy as np
import pytest

import bipe_jax
from bipe_jax.data import marked, tokenizer
from bipe_jax.errors import UserError
from bipe_jax.evaluation import loaded
from bipe_jax.experiments import modalities as experiments
from bipe_jax.modalities import games, places, proofs

PROOF = "prove |- q\n1 id |- p\n12 1,11 mp |- q\n13 12 19.2 |- q\n"


def encoded(words, text):
    tokens = tokenizer.load(words)
    return tokens, *marked.encode_whole(tokens, {"text": text, "set": ""}, ())


def test_references_are_right_if_all_their_tokens_are(tokenizer_file):
    tokens, row, sizes = encoded(tokenizer_file, PROOF)
    listed = list(proofs.places(PROOF))
    assert [(p.number, PROOF[p.start : p.end]) for p in listed] == [(12, "1,11"), (13, "12")]
    assert [
        PROOF.replace("1,11", "-11,-1")[p.start : p.end]
        for p in proofs.places(PROOF.replace("1,11", "-11,-1"))
    ] == ["-11,-1", "12"]
    actual = [tokens.decode([token]) for token in row["tokens"].tolist()]
    ends = np.cumsum(sizes)
    for wrong in range(1, len(actual)):
        predicted = [*actual[:wrong], "another", *actual[wrong + 1 :]]
        own = list(places.judged(listed, sizes, actual, predicted))
        for place, (before, is_right) in zip(listed, own, strict=True):
            begin, end = ends[wrong] - sizes[wrong], ends[wrong]
            touched = max(begin, place.start) < min(end, place.end)
            assert is_right == (not touched)
            assert before == sum(end <= place.start for end in ends)


def test_moves_are_legal_by_the_board_and_a_copy_of_the_game_is_right():
    chess = pytest.importorskip("chess")
    moves = games.play(random.Random(4), 80)
    text = games.document("", moves).text
    _, row, sizes = encoded("symbols:" + " ".join(games.WORDS), text)
    listed = list(games.places(text))
    actual = ["", *text.split(" ")]
    assert len(actual) == len(row["tokens"]) and len(listed) == 2 * len(moves)

    def shares(predicted):
        own = places.judged(listed, sizes, actual, predicted)
        return np.mean([is_right for _, is_right in own])

    assert shares(actual) == 1
    draws = random.Random(1)
    drawn = [draws.choice(games.WORDS) for _ in actual]
    assert shares(drawn) < 0.3
    # A plain loop over the board.
    board, at, wanted = chess.Board(), 1, []
    for move in moves:
        legal = [one.uci() for one in board.legal_moves]
        wanted.append(drawn[at] in [one[:2] for one in legal])
        wanted.append(move[:2] + drawn[at + 1] in [one[:4] for one in legal])
        at += len(games.words(move))
        board.push_uci(move)
    assert [is_right for _, is_right in places.judged(listed, sizes, actual, drawn)] == wanted
    for wrong in ("e2 e4 e2 e4", "e2 e4 x", "e2"):
        with pytest.raises(UserError, match="no game of chess"):
            list(games.places(wrong))


def test_the_most_probable_tokens_are_those_of_the_logits(run, texts):
    config, params = bipe_jax.load(run)
    draws = np.random.RandomState(0)  # one that is hardly trained says the same everywhere
    noisy = jax.tree.map(lambda x: x + draws.normal(size=x.shape).astype(x.dtype), params)
    model = loaded.on_all_devices(config, noisy, loaded.load(run).tokenizer)
    rows = [{"tokens": model.tokenizer.encode(text[:size]).astype(np.int32)}
            for text, size in zip(texts, (40, 300, 90), strict=False)]  # fmt: skip
    for row, own in zip(rows, places.likeliest(model, rows), strict=True):
        logits = bipe_jax.apply(config, noisy, row["tokens"][None])[0]
        np.testing.assert_array_equal(own[1:], np.argmax(logits, axis=-1)[:-1])
        assert len(own) == len(row["tokens"]) and len(set(own.tolist())) > 10


def test_places_of_a_checkpoint_are_counted_by_step_and_by_tokens(run, tmp_path, command):
    lines = [{"text": PROOF, "meta": {"pile_set_name": proofs.SET}}] * 2 + [{"text": "prose"}]
    shard = tmp_path / "held-out.jsonl"
    shard.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = command(
        "modalities.places", f"--checkpoint={run}", f"--data={shard}", f"--output={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / places.FILE).read_text())
    by = {(row["by"], row["at"]): row["total"] for row in result["results"]}
    assert result["documents"] == 2 and by["number", 12] == by["number", 13] == 2
    assert sum(total for (kind, _), total in by.items() if kind == places.TOKENS) == 4
    shard.write_text(json.dumps(lines[-1]) + "\n")
    done = command(
        "modalities.places", f"--checkpoint={run}", f"--data={shard}", f"--output={tmp_path}"
    )
    assert done.returncode == 1 and "has no set of chess, set.mm" in done.stderr


def test_cells_are_of_ranges_that_double():
    rows = [
        {"measure": measure, "by": by, "at": at, "right": at, "total": 500}
        for measure in ("legal move", "legal piece")
        for by, at in (("number", 15), ("number", 16), ("number", 31), ("tokens", 64))
    ]
    cells = experiments.cells_of_games({"places/places.json": {"results": rows}})
    moves = [(cell.x, cell.right) for cell in cells if cell.measure == "legal move"]
    assert moves == [(15, 15), (30, 16), (60, 31)]
    assert [places.doubling(n) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 8]


@pytest.mark.slow
def test_an_experiment_prepares_its_games_trains_on_them_and_counts_legal_moves(tmp_path, command):
    pytest.importorskip("chess")
    done = command("experiments", "modalities-chess", "--size=quick", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "quick" / "held-out.jsonl").exists()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["measure"] for row in rows} == {"legal move", "legal piece"}
    assert {row["arm"] for row in rows} == {"bipe_rope", "rope", "nope"}
    assert max(row["x"] for row in rows) > 60 and all(0 <= row["mean"] <= 1 for row in rows)
