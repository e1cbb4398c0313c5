"""Attention by distance: against a float64 softmax of all logits, and the command."""

import json
import math

import jax
import numpy as np
import numpy_reference
import pytest
import tiny

from bipe_jax import model, segments
from bipe_jax.errors import UserError
from bipe_jax.evaluation import attention_distance, loaded
from bipe_jax.evaluation.attention_distance import BY

NAMED = {
    "none": ((), ()),
    "absolute": ((("learned", "offset"), ("sinusoidal", "position")), ()),
    "rotary": ((("learned", "offset"),), (("rope", "segment"),)),
    "bias": ((("learned", "offset"),), (("alibi", "segment", ("slope_scale", 96.0)),)),
    "both": ((), (("rope", "position"), ("alibi", "segment"))),
}


def bin_of(distance: int) -> int:
    return 0 if distance == 0 else 1 + int(math.log2(distance))


@pytest.fixture
def weights(monkeypatch):
    """All that `numpy_reference.attend` weighs with, a (B, N, L, L) float64 array for each layer."""
    found, attend = [], numpy_reference.attend

    def recording(q, k, v, bias=None, document_ids=None):
        _, L, N, H = q.shape
        k_all = np.repeat(k, N // k.shape[2], axis=2)
        logits = np.einsum("blnh,bsnh->bnls", q, k_all) / np.sqrt(H) + bias
        logits[:, :, ~np.tri(L, dtype=bool)] = -np.inf
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
        found.append(exponentials / exponentials.sum(axis=-1, keepdims=True))
        return attend(q, k, v, bias, document_ids)

    monkeypatch.setattr(numpy_reference, "attend", recording)
    return found


def tiny_model(encoding="rotary", **overrides):
    absolute, relative = NAMED[encoding]
    config = tiny.tiny_plan(position__absolute=absolute, position__relative=relative, **overrides)
    params = model.init(config, jax.random.key(0))
    # At the start attention hardly tells tokens apart: larger weights make it choose.
    params["layers"]["attention"] = jax.tree.map(lambda x: 10 * x, params["layers"]["attention"])
    return config, params


def blocks_of(config, count, length):
    tokens = np.random.default_rng(0).integers(0, 64, (count, length), np.int32)
    tokens[:, 3::9] = 1  # separators
    return tokens


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("encoding", NAMED)
def test_measures_equal_a_float64_softmax_of_all_logits(encoding, kv_heads, weights, monkeypatch):
    monkeypatch.setattr(attention_distance, "CHUNK", 8)  # 3 chunks and a rest
    config, params = tiny_model(encoding, model__kv_heads=kv_heads)
    config = config.replace({"evaluation.batch_tokens": 54})  # 2 of the 3 blocks at a time
    blocks = blocks_of(config, 3, 27)  # beyond the training length
    loaded_model = loaded.on_all_devices(config, params)
    bins, means, uniform = attention_distance.measure(loaded_model, blocks)

    coordinates = segments.coordinates(blocks, loaded_model.rule)
    numpy_reference.logits(config, params, {"tokens": blocks, **coordinates})
    B, L = blocks.shape
    for by in BY:
        at = coordinates[by]
        wanted = np.zeros((len(weights), 4, len(bins[by])))
        alike = np.zeros(len(bins[by]))
        for b in range(B):
            for i in range(L):
                for j in range(i + 1):
                    number = bin_of(at[b, i] - at[b, j])
                    low, high = bins[by][number]
                    assert low <= at[b, i] - at[b, j] <= high
                    alike[number] += 1 / (i + 1) / B / L
                    for layer, of_layer in enumerate(weights):
                        wanted[layer, :, number] += of_layer[b, :, i, j] / B / L
        np.testing.assert_allclose(means[by], wanted, atol=2e-6)
        np.testing.assert_allclose(means[by].sum(axis=-1), 1, atol=1e-6)
        np.testing.assert_allclose(uniform[by], alike, atol=1e-12)
        assert uniform[by][-1] > 0
    for layer, of_layer in enumerate(weights):
        logarithms = np.log(of_layer, where=of_layer > 0, out=np.zeros_like(of_layer))
        entropy = -(of_layer * logarithms).sum(axis=-1).mean(axis=(0, 2))
        np.testing.assert_allclose(means["entropy"][layer], entropy, atol=1e-5)
        np.testing.assert_allclose(
            means["first"][layer], of_layer[..., 0].mean(axis=(0, 2)), atol=2e-6
        )


def test_marks_of_a_segmenter_are_measured_as_the_same_segments_of_separators():
    config, params = tiny_model("rotary")
    blocks = blocks_of(config, 3, 27)
    starts = np.zeros_like(blocks)
    starts[:, 1:] = np.isin(blocks[:, :-1], config.segment_rule.separators)
    wanted = attention_distance.measure(loaded.on_all_devices(config, params), blocks)
    marked, _ = tiny_model("rotary", segments__rule="ast")
    found = attention_distance.measure(loaded.on_all_devices(marked, params), blocks, starts)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("encoding", NAMED)
def test_the_model_goes_on_as_ever(encoding):
    config, params = tiny_model(encoding, model__kv_heads=2)
    tokens = blocks_of(config, 2, 24)
    inputs = {"tokens": tokens, **segments.coordinates(tokens, config.segment_rule)}
    attend = attention_distance.attend_and_measure(config, inputs, {"segment": 3})
    got, _, found = model.run(config, params, inputs, attend)
    np.testing.assert_allclose(got, model.hidden(config, params, inputs)[0], atol=1e-5)
    assert found["segment"].shape == (2, 2, 4, 3)


def test_bins():
    assert attention_distance.bins_to(0) == [(0, 0)]
    assert attention_distance.bins_to(1) == [(0, 0), (1, 1)]
    assert attention_distance.bins_to(4) == [(0, 0), (1, 1), (2, 3), (4, 7)]
    for largest in range(70):
        bins = attention_distance.bins_to(largest)
        assert [bins[bin_of(d)][0] <= d <= bins[bin_of(d)][1] for d in range(largest + 1)]
        assert bins[-1][0] <= largest <= bins[-1][1]


def test_memory_grows_linearly_with_length():
    config, params = tiny_model("bias")

    def size(length):
        tokens = blocks_of(config, 1, length)
        inputs = {"tokens": tokens, **segments.coordinates(tokens, config.segment_rule)}

        def run(params, inputs):
            return attention_distance._measures(
                config, {"segment": 9, "position": 14}, params, inputs
            )

        return jax.jit(run).lower(params, inputs).compile().memory_analysis().temp_size_in_bytes

    assert size(8192) <= 4.5 * size(2048)


def test_the_sets_take_turns_and_short_documents_do_not():
    texts = [("a", "one"), ("a", "longer"), ("a", "longest"), ("b", "tiny"), ("a", "largest")]
    documents = [{"set": s, "text": t} for s, t in [*texts, ("c", "brother"), ("c", "sisters")]]

    def encode(document):
        tokens = np.array([ord(c) for c in document["text"]], np.int32)
        return {"tokens": tokens, "starts": tokens + 1}

    def chosen(longest, limit):
        rows = attention_distance.choose(documents, encode, longest, limit)
        assert all((row["starts"] == row["tokens"] + 1).all() for row in rows)
        return ["".join(map(chr, row["tokens"])) for row in rows]

    assert chosen(6, 3) == ["longer", "brothe", "longes"]
    assert chosen(6, 9) == ["longer", "brothe", "longes", "sister", "larges"]
    assert chosen(4, 2) == ["long", "tiny"]
    assert attention_distance.choose(documents, encode, 8, 2) == []


def test_the_command(run, command, tmp_path):
    done = command("analyse", f"--checkpoint={run}", f"--output={tmp_path / 'a'}", "--blocks=3")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "a" / "attention.json").read_text())
    assert (result["kind"], result["name"], result["documents"]) == ("attention", "a", 3)
    rows = result["results"]
    places = [(row["length"], row["by"], row["layer"], row["head"]) for row in rows]
    wanted = {(n, by, i, h) for n in (32, 128) for by in BY for i in (0, 1) for h in (0, 1)}
    assert len(places) == len(wanted) and set(places) == wanted
    for row in [*rows, *result["uniform"]]:
        assert sum(b["weight"] for b in row["bins"]) == pytest.approx(1)
        assert [b["from"] for b in row["bins"]][:4] == [0, 1, 2, 4]
    # The last bin of positions is that of length - 1, and no more.
    ends = {row["length"]: row["bins"][-1]["to"] for row in rows if row["by"] == "position"}
    assert ends == {32: 31, 128: 127}
    firsts = [row["first"] for row in result["heads"] if row["length"] == 32 and row["layer"] == 1]
    line = next(line for line in done.stdout.splitlines() if line.startswith("32, 1 "))
    assert line.split()[3] == f"{np.mean(firsts):.1%}"
    failed = command("analyse", f"--checkpoint={run}", "--lengths=many")
    assert failed.returncode == 1
    assert failed.stderr == "error: --lengths=many must be whole numbers, such as 256,512\n"


def test_wrong_input_is_refused_by_name(run, tmp_path):
    (tmp_path / "file").write_text("")
    for wanted, given in (
        ("no such directory", {"path": str(tmp_path / "none")}),
        ("no file matches 'none.jsonl'", {"data": "none.jsonl"}),
        ("no document of .* has 100000 tokens: use shorter --lengths", {"lengths": (9, 100_000)}),
        ("at least 2", {"lengths": (1,)}),
        ("--blocks=0 must be at least 1", {"blocks": 0}),
        ("--output=.*file is not writable: File exists", {"output": str(tmp_path / "file")}),
    ):
        with pytest.raises(UserError, match=wanted):
            attention_distance.analyse(**{"path": run, **given})
