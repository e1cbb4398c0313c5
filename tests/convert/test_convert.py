"""Checkpoints of other projects -> ours. Logits against float64 NumPy and against transformers."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import numpy_reference as reference
import pytest
from safetensors.numpy import load_file, save_file
from tiny import ENCODINGS, tiny_plan

import bipe_jax
from bipe_jax import checkpoint, model
from bipe_jax.convert import authors, files, from_hf, incoming, llama, mapping, to_hf
from bipe_jax.data import tokenizer
from bipe_jax.data.batches import Batches
from bipe_jax.errors import UserError
from bipe_jax.evaluation import decode, loaded
from bipe_jax.positions import NAMED
from bipe_jax.training.trainer import train

PIECES = 900  # so many that id 869, the authors' second separator, is among them
WIDTH, FEED_FORWARD, LAYERS, HEADS = 24, 40, 2, 3  # 3 heads: ALiBi's slopes are completed
RPE_TYPES = ("rope", "alibi", "bipe_rope", "bipe_alibi")


@pytest.fixture(scope="module")
def spm(tmp_path_factory, texts) -> str:
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    path.write_bytes(tokenizer.train(texts, PIECES, 100_000).model)
    return str(path)


def _theirs(rpe_type: str, rows: int, **changes) -> tuple[dict, dict]:
    """A config and random tensors with the authors' names and shapes (PyTorch's: outputs first)."""
    config = {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "vocab_size": PIECES,
        "max_position_embeddings": rows,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "rpe_type": rpe_type,
        "log_scale": False,
        "train_scale": rows,
    } | changes
    rng = np.random.default_rng(0)

    def matrix(*shape):
        return (0.15 * rng.standard_normal(shape)).astype(np.float32)

    def scale():
        return (1 + 0.2 * rng.standard_normal(WIDTH)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(PIECES, WIDTH),
        "model.norm.weight": scale(),
        "lm_head.weight": matrix(PIECES, WIDTH),
    }
    if rpe_type.startswith("bipe"):
        tensors["model.embeds.0.weight"] = matrix(rows, WIDTH)
    for i in range(LAYERS):
        layer = {f"self_attn.{name}_proj.weight": matrix(WIDTH, WIDTH) for name in "qkvo"}
        layer |= {f"mlp.{name}_proj.weight": matrix(FEED_FORWARD, WIDTH) for name in ("gate", "up")}
        layer["mlp.down_proj.weight"] = matrix(WIDTH, FEED_FORWARD)
        layer["input_layernorm.weight"] = scale()
        layer["post_attention_layernorm.weight"] = scale()
        if "alibi" in rpe_type:
            layer["self_attn.alibi"] = matrix(1, HEADS, 1, rows)
        tensors |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return config, tensors


def _write(directory, config: dict, tensors: dict, spm: str) -> str:
    os.makedirs(directory)
    with open(directory / "config.json", "w") as file:
        json.dump(config, file)
    save_file(tensors, directory / "model.safetensors")
    shutil.copy(spm, directory / "tokenizer.model")
    return str(directory)


def _logits(config: dict, tensors: dict, tokens) -> np.ndarray:
    """What the authors' model computes, in float64: PAPER.md's facts, one token after the other."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    B, L = tokens.shape
    kind = config["rpe_type"]
    position = np.broadcast_to(np.arange(L), (B, L))
    segment, offset = np.zeros((B, L), int), np.zeros((B, L), int)
    for b in range(B):
        for i in range(1, L):
            ended = tokens[b, i - 1] in (13, 869)
            segment[b, i] = segment[b, i - 1] + ended
            offset[b, i] = 0 if ended else offset[b, i - 1] + 1
    bilevel = kind.startswith("bipe")
    coordinate = segment if bilevel else position
    x = w["model.embed_tokens.weight"][tokens]
    if bilevel:
        x = x + w["model.embeds.0.weight"][np.minimum(offset, min(config["train_scale"], 1024) - 1)]
    bias = None
    if "alibi" in kind:
        bias = reference.alibi(coordinate, HEADS, 96.0 if bilevel else 1.0)
    for i in range(LAYERS):
        layer = {
            name.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): tensor
            for name, tensor in w.items()
        }
        y = reference.rms_norm(x, layer["input_layernorm"], config["rms_norm_eps"])
        q, k, v = (
            (y @ layer[f"self_attn.{name}_proj"].T).reshape(B, L, HEADS, WIDTH // HEADS)
            for name in "qkv"
        )
        if "rope" in kind:
            q, k = (reference.rope(z, coordinate) for z in (q, k))
        mixed = reference.attend(q, k, v, bias).reshape(B, L, WIDTH)
        x = x + mixed @ layer["self_attn.o_proj"].T
        y = reference.rms_norm(x, layer["post_attention_layernorm"], config["rms_norm_eps"])
        x = x + reference.swiglu(
            y, *(layer[f"mlp.{name}_proj"].T for name in ("gate", "up", "down"))
        )
    x = reference.rms_norm(x, w["model.norm.weight"], config["rms_norm_eps"])
    return x @ w["lm_head.weight"].T


def _tokens(L: int) -> np.ndarray:
    """Two rows with both separators and, in the second, one segment as long as can be."""
    tokens = np.random.default_rng(1).integers(14, 868, (2, L)).astype(np.int32)
    tokens[0, 4::9], tokens[0, 7::23], tokens[1, 2], tokens[1, 5] = 13, 869, 869, 13
    return tokens


def _params_equal(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
        jax.tree.map(lambda x, y: bool(np.array_equal(np.asarray(x), np.asarray(y))), a, b)
    )


@pytest.mark.parametrize("rpe_type", RPE_TYPES)
def test_authors_logits(rpe_type, tmp_path, spm):
    """Their float64 logits; offsets reach past the last of 16 rows."""
    config, tensors = _theirs(rpe_type, rows=16)
    source = _write(tmp_path / "source", config, tensors, spm)
    incoming.convert(source, tmp_path / "ours", authors)
    ours, params = bipe_jax.load(tmp_path / "ours")
    tokens = _tokens(40)
    found = np.asarray(bipe_jax.apply(ours, params, tokens))
    expected = _logits(config, tensors, tokens)
    assert expected.std() > 0.3  # so that 1e-4 means something
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert ours.segments.rule == "newline-and-spaced-period"
    assert ours.segment_rule.separators == (13, 869)
    assert ours.sequence_length == 16


def test_authors_offsets_end_at_1023(tmp_path, spm):
    """Their code clips there, however long the table that `train_scale` asks for."""
    config, tensors = _theirs("bipe_rope", rows=1040)
    source = _write(tmp_path / "source", config, tensors, spm)
    incoming.convert(source, tmp_path / "ours", authors)
    ours, params = bipe_jax.load(tmp_path / "ours")
    tokens = _tokens(1036)
    found = np.asarray(bipe_jax.apply(ours, params, tokens))
    np.testing.assert_allclose(found, _logits(config, tensors, tokens), atol=1e-5)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, spm) -> dict:
    """A BiPE-RoPE checkpoint of the authors' kind, and what became of it."""
    directory = tmp_path_factory.mktemp("converted")
    config, tensors = _theirs("bipe_rope", rows=16)
    source = _write(directory / "source", config, tensors, spm)
    incoming.convert(source, directory / "ours", authors)
    _, params = bipe_jax.load(directory / "ours")
    return {
        "config": config,
        "tensors": tensors,
        "source": source,
        "ours": str(directory / "ours"),
        "params": params,
    }


@pytest.mark.slow
def test_command_and_evaluation(converted, tmp_path, command, held_out, spm):
    """As a stranger would: convert, evaluate, and see that a training cannot go on from it."""
    done = command("convert", "from-authors", converted["source"], str(tmp_path / "ours"))
    assert done.returncode == 0, done.stderr
    note, wrote = done.stderr.splitlines()
    assert "Note: segments end at the ids (13, 869)" in note and "Wrote" in wrote
    placed = loaded.load(tmp_path / "ours")
    assert placed.step == 0 and placed.tokenizer.vocab_size == PIECES
    assert _params_equal(placed.params, converted["params"])
    arguments = ("--lengths=32,64", f"--data={held_out}", "--tokens=64")
    done = command("evaluate", f"--checkpoint={tmp_path}/ours", *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "ours/evaluation.json").read_text())
    assert {row["length"] for row in result["results"]} == {32, 64}
    # Twice into one place is refused, by each of its names.
    for place in ("ours", "ours/checkpoints", "ours/checkpoints/0"):
        done = command("convert", "from-authors", converted["source"], str(tmp_path / place))
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "holds a checkpoint already" in done.stderr


def test_decoding(converted):
    """The likeliest token of the authors' float64 logits, one after the other."""
    prompt = _tokens(20)[0, :12]
    held = prompt
    for _ in range(6):
        likeliest = _logits(converted["config"], converted["tensors"], held[None])[0, -1].argmax()
        held = np.append(held, likeliest)
    placed = loaded.load(converted["ours"])
    (found,) = decode.Generator(placed, 18)([prompt], 6)
    assert list(found) == list(held[12:])


def test_no_training_goes_on_from_a_model_alone(converted):
    with (
        checkpoint.Checkpoints(converted["ours"], keep=1, every=1) as checkpoints,
        pytest.raises(UserError, match=r"model alone.*initial_checkpoint"),
    ):
        assert checkpoints.meta().step == 0
        checkpoints.restore({}, 0)


@pytest.mark.parametrize("relative", [("rope", "segment"), ("rope", "position")])
def test_a_new_run_starts_from_it(converted, tmp_path, shards, held_out, relative, capsys):
    """The same encoding or another one; its first loss is that of the converted parameters."""
    config = loaded.load(converted["ours"]).config.replace({
        "initial_checkpoint": converted["ours"],
        "segments.rule": "sentence", "position.relative": (relative,),
        "mesh.data": 0, "mesh.fsdp": 1,
        "steps": 2, "batch_size": 2, "accumulation": 1, "sequence_length": 16, "loss_chunk": 16,
        "schedule.warmup_steps": 1, "schedule.decay_steps": 0,
        "data.train": shards, "data.evaluation": held_out, "data.shuffle_blocks": 8,
    })  # fmt: skip
    train(config, str(tmp_path / "run"))
    assert "Starting from step 0" in capsys.readouterr().err
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    batches = Batches(
        checkpoint.load(str(tmp_path / "run"))[0].config,
        loaded.load(converted["ours"]).tokenizer,
    )
    batch = next(batches)
    batches.close()
    inputs = {name: batch[name] for name in ("tokens", "position", "segment", "offset")}
    logits = np.asarray(model.apply(config, converted["params"], inputs), np.float64)
    picked = np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    losses = np.log(np.exp(logits).sum(axis=-1)) - picked
    assert first["loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_separators_are_compared_with_the_tokenizers(converted, capsys, tmp_path, monkeypatch):
    """Nothing is said where the pieces give the authors' ids."""
    pieces = ["x"] * PIECES
    pieces[13], pieces[869] = "\n", " ."
    monkeypatch.setattr(tokenizer.Tokenizer, "pieces", lambda self: pieces)
    incoming.convert(converted["source"], tmp_path / "ours", authors)
    assert "Note" not in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_and_shards(converted, tmp_path, spm, dtype):
    """Values are those of the files, exactly; two shards and an index."""
    source = tmp_path / "source"
    tensors = {name: tensor.astype(dtype) for name, tensor in converted["tensors"].items()}
    _write(source, converted["config"], {}, spm)
    os.remove(source / "model.safetensors")
    names = sorted(tensors)
    index = {}
    for shard, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, source / f"{shard}.safetensors")
        index |= dict.fromkeys(part, f"{shard}.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    incoming.convert(str(source), tmp_path / "ours", authors)
    config, params = bipe_jax.load(tmp_path / "ours")
    found = dict(mapping.to_llama(config, params))
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name].astype(np.float32)) for name in names)


@pytest.mark.parametrize("layout", ["one", "old", "shards", "bfloat16"])
def test_pytorch_files(converted, tmp_path, layout):
    torch = pytest.importorskip("torch")
    source = tmp_path / "source"
    shutil.copytree(converted["source"], source)
    os.remove(source / "model.safetensors")
    tensors = {name: torch.tensor(tensor) for name, tensor in converted["tensors"].items()}
    expected = converted["params"]
    if layout == "bfloat16":
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        expected = jax.tree.map(
            lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16).astype(np.float32), expected
        )
    if layout == "shards":
        index = {name: f"{i % 2}.bin" for i, name in enumerate(tensors)}
        for shard in set(index.values()):
            part = {name: tensors[name] for name in tensors if index[name] == shard}
            torch.save(part, source / shard)
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    else:
        zipped = layout != "old"
        torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    incoming.convert(str(source), tmp_path / "ours", authors)
    assert _params_equal(bipe_jax.load(tmp_path / "ours")[1], expected)


class _Code:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def test_pytorch_files_run_no_code(converted, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(converted["source"], tmp_path / "source")
    os.remove(tmp_path / "source/model.safetensors")
    torch.save({"a": _Code()}, tmp_path / "source/pytorch_model.bin")
    with pytest.raises(UserError, match="more than tensors"):
        incoming.convert("source", "ours", authors)
    assert not os.path.exists("it-ran") and not os.path.exists("ours")


def test_pytorch_missing(converted, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    shutil.copytree(converted["source"], tmp_path / "source")
    os.rename(tmp_path / "source/model.safetensors", tmp_path / "source/pytorch_model.bin")
    with pytest.raises(UserError, match=r"only PyTorch reads safely.*\[convert\]"):
        incoming.convert(str(tmp_path / "source"), tmp_path / "ours", authors)


def _set(**changes):
    """Changes config.json; None takes the key out."""

    def change(source):
        config = json.loads((source / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not None}
        (source / "config.json").write_text(json.dumps(config))

    return change


def _retensor(function):
    def change(source):
        tensors = _theirs("bipe_rope", rows=16)[1]
        function(tensors)
        save_file(tensors, source / "model.safetensors")

    return change


def _cut(name, size):
    def change(source):
        content = (source / name).read_bytes()
        (source / name).write_bytes(content[:size])

    return change


def _move(old, new):
    return lambda source: os.rename(source / old, source / new)


def _empty_index(source):
    os.remove(source / "model.safetensors")
    (source / "model.safetensors.index.json").write_text("{}")


def _missing_shard(source):
    os.rename(source / "model.safetensors", source / "1.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


Q = "model.layers.0.self_attn.q_proj.weight"
FAULTS = {
    "no directory": (shutil.rmtree, "source: no such directory"),
    "no config": (lambda s: os.remove(s / "config.json"), "config.json cannot be read: No such"),
    "half a config": (_cut("config.json", 40), "config.json is not JSON, or only half"),
    "a list": (lambda s: (s / "config.json").write_text("[]"), "must hold a JSON object"),
    "rpe_type": (_set(rpe_type="t5"), "rpe_type='t5' is unknown: use one of rope, alibi, bipe_"),
    "plain": (_set(rpe_type=None), "no rpe_type.*from-llama"),
    "log_scale": (_set(log_scale=True), "log_scale=True is not supported"),
    "scaling": (
        _set(rope_scaling={"type": "linear", "factor": 2.0}),
        "rope scaling of the kind 'linear' is not supported",
    ),
    "no width": (_set(hidden_size=None), "config.json has no 'hidden_size'"),
    "a text": (_set(num_hidden_layers="2"), "num_hidden_layers='2' must be of the type int"),
    "a flag": (_set(tie_word_embeddings=1), "tie_word_embeddings=1 must be of the type bool"),
    "act": (_set(hidden_act="gelu"), "hidden_act='gelu' is not supported: only 'silu'"),
    "head_dim": (_set(head_dim=16), r"head_dim=16 is not supported.* = 24 / 3"),
    "heads": (_set(num_key_value_heads=2), "makes no config of ours: config.model.kv_heads=2"),
    "no tokenizer": (
        lambda s: os.remove(s / "tokenizer.model"),
        "tokenizer.model does not exist: give a SentencePiece file, --tokenizer=FILE",
    ),
    "other kind of tokenizer": (
        _move("tokenizer.model", "tokenizer.json"),
        "does not exist, and a tokenizer.json may be .*byte-level BPE",
    ),
    "half a tokenizer": (_cut("tokenizer.model", 999), "is not a SentencePiece model"),
    "vocabulary": (_set(vocab_size=901), "has 900 pieces, but the model's vocab_size is 901"),
    "no tensors": (
        lambda s: os.remove(s / "model.safetensors"),
        "neither model.safetensors nor pytorch_model.bin",
    ),
    "half the tensors": (_cut("model.safetensors", 5000), "half-written or no safetensors"),
    "no header": (_cut("model.safetensors", 3), "half-written or no safetensors"),
    "empty index": (_empty_index, "index.json has no weight_map"),
    "missing shard": (_missing_shard, "names 2 files, but .*2.safetensors is missing"),
    "missing": (
        _retensor(lambda t: [t.pop(name) for name in list(t) if "layers.1" in name]),
        r"lacks tensors .*: model.layers.1.input_layernorm.weight, .*, \.\.\. \(9 in all\)",
    ),
    "surplus": (
        _retensor(lambda t: t.update({"model.layers.0.mlp.gate_proj.bias": t[Q][0]})),
        "does not account for: model.layers.0.mlp.gate_proj.bias$",
    ),
    "shape": (
        _retensor(lambda t: t.update({Q: t[Q][:8]})),
        rf"{re.escape(Q)} has the shape \(8, 24\), but its config asks for \(24, 24\)",
    ),
    "table": (_set(train_scale=17), r"model.embeds.0.weight has the shape \(16, 24\).* \(17, 24\)"),
    "type": (
        _retensor(lambda t: t.update({Q: t[Q].astype(np.int8)})),
        rf"{re.escape(Q)} is of type I8; only float32, float16, bfloat16",
    ),
    "tied": (_set(tie_word_embeddings=True), "ties the output to the embedding, but lm_head"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_source(fault, converted, tmp_path):
    change, line = FAULTS[fault]
    shutil.copytree(converted["source"], tmp_path / "source")
    change(tmp_path / "source")
    with pytest.raises(UserError) as raised:
        incoming.convert(str(tmp_path / "source"), tmp_path / "ours", authors)
    assert re.search(line, str(raised.value)) and "\n" not in str(raised.value)
    assert not (tmp_path / "ours").exists()


def test_faults_of_pytorch_files(converted, tmp_path):
    torch = pytest.importorskip("torch")
    source = tmp_path / "source"
    shutil.copytree(converted["source"], source)
    os.remove(source / "model.safetensors")
    path = source / "pytorch_model.bin"
    torch.save({"a": torch.ones(99)}, path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="half-written"):
        incoming.convert(str(source), tmp_path / "ours", authors)
    torch.save([torch.ones(2)], path)
    with pytest.raises(UserError, match="must hold a dict of tensors"):
        incoming.convert(str(source), tmp_path / "ours", authors)


def test_config_and_tokenizer_are_checked_first(converted, tmp_path, tokenizer_file, monkeypatch):
    """Before a file that may be huge is opened; and the destination before all."""
    monkeypatch.setattr(files, "Tensors", lambda *_: pytest.fail("opened"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        incoming.convert(converted["source"], tmp_path / "file", authors)
    with pytest.raises(UserError, match="has 512 pieces, but the model's vocab_size is 900"):
        incoming.convert(converted["source"], tmp_path / "ours", authors, tokenizer_file)
    shutil.copytree(converted["source"], tmp_path / "source")
    _set(hidden_act="gelu")(tmp_path / "source")
    with pytest.raises(UserError, match="hidden_act"):
        incoming.convert(str(tmp_path / "source"), tmp_path / "ours", authors)


def test_a_failed_save_leaves_nothing(converted, tmp_path):
    """Whether DST, or its directory of checkpoints, was there before. Files are cut at 20 kB."""
    for there in ("0", "1/ours", "2/ours/checkpoints"):
        os.makedirs(tmp_path / there)
    (tmp_path / "1/ours/mine").touch()
    before = sorted(tmp_path.rglob("*"))
    program = (
        "import os, resource, signal, sys\n"
        "from bipe_jax import cli\n"
        "from bipe_jax.convert import authors, incoming\n"
        "from bipe_jax.errors import UserError\n"
        "cli.quiet()\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "for destination in sys.argv[2:]:\n"
        "    try:\n"
        "        incoming.convert(sys.argv[1], destination, authors)\n"
        "    except UserError as error:\n"
        "        print(error, flush=True)\n"
        "os._exit(0)\n"
    )
    destinations = [str(tmp_path / name / "ours") for name in "012"]
    line = [sys.executable, "-c", program, converted["source"], *destinations]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.stdout.count("saving a checkpoint to") == 3, done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["t5", "bipe_kerple_log", "bipe_fox"])
def test_parameters_of_relative_encodings_have_no_counterpart(name):
    absolute, relative = NAMED[name]
    config = tiny_plan(position__absolute=absolute, position__relative=relative)
    with pytest.raises(UserError, match=r"relative/.*' has no counterpart in Llama's"):
        mapping.pairs(config)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("tied", [False, True])
def test_mapping_there_and_back(encoding, tied):
    absolute, relative = ENCODINGS[encoding]
    config = tiny_plan(
        position__absolute=absolute,
        position__relative=relative,
        model__tied_output=tied,
        model__kv_heads=2,
    )
    params = model.init(config, jax.random.key(0))
    tensors = dict(mapping.to_llama(config, params))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    mapping.check(config, shapes, "x")
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())
    assert ("lm_head.weight" in tensors) != tied
    assert _params_equal(mapping.from_llama(config, shapes, tensors.get, "x"), params)


def _real(spm, **changes):
    """A random model of transformers' own, its norms too."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": PIECES,
        "max_position_embeddings": 48,
        "initializer_range": 0.15,
    }
    torch.manual_seed(0)
    real = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes)).eval()
    with torch.no_grad():
        for name, parameter in real.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return real


SCALED = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 12},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 12,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 12,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rms_norm_eps": 1e-3},
        *(
            {"rope_parameters": {"rope_theta": 100.0, "rope_type": kind, **scaling}}
            for kind, scaling in SCALED.items()
        ),
    ],
    ids=["plain", "grouped", "tied", "theta", *SCALED],
)
@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_llama_logits(changes, shard, spm, tmp_path):
    real = _real(spm, **changes)
    torch = pytest.importorskip("torch")
    real.save_pretrained(tmp_path / "source", max_shard_size=shard)
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > (shard == "40KB")
    incoming.convert(str(tmp_path / "source"), tmp_path / "ours", llama, spm)
    config, params = bipe_jax.load(tmp_path / "ours")
    tokens = _tokens(64 if "dynamic" in str(changes) else 48)  # beyond its length
    with torch.no_grad():
        expected = real(torch.tensor(tokens).long()).logits.numpy()
    assert expected.std() > 0.3
    found = np.asarray(bipe_jax.apply(config, params, tokens))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert config.sequence_length == 48 and config.segments.rule == "sentence"
    assert config.segment_rule.separators


LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 1000,
    "rope_theta": 5e5,
    "rope_scaling": None,
}


def test_llama_before_transformers_5():
    """rope_theta at the top, and keys that are missing."""
    config = llama.config_of(LLAMA, "x")
    assert config.position.relative == (("rope", "position", ("theta", 5e5)),)
    assert config.sequence_length == 1000 and config.sequence_length % config.loss_chunk == 0
    assert config.model.kv_heads == 4 and config.model.norm_epsilon == 1e-6


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model_type": "mistral"}, "model_type='mistral' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not"),
        ({"rope_scaling": {"type": "proportional"}}, "kind 'proportional' is not supported"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 2.0}},
            "low_freq_factor=2.0 of the rope scaling 'llama3' is not supported",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
            "has no 'long_factor'",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' must be of the type dict"),
        ({"head_dim": 16}, "head_dim=16 is not supported"),
        ({"rpe_type": "rope"}, "rpe_type='rope'.*from-authors"),
    ],
)
def test_llama_refuses(changes, line):
    """What our decoder would compute otherwise."""
    with pytest.raises(UserError, match=f"^x.*{line}"):
        llama.config_of(LLAMA | changes, "x")


# Files that may be of anybody.


@pytest.mark.parametrize("rows", [PIECES + 1, PIECES + 124])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rpe_type", [None, "bipe_rope"])
def test_rows_without_a_piece_are_left_out(rows, tied, rpe_type, tmp_path, spm, capsys):
    """Padding, or added tokens; whatever they contain, the rest is as without them."""
    config, tensors = _theirs(
        rpe_type or "rope", rows=16, tie_word_embeddings=tied, vocab_size=rows
    )
    format = authors
    if rpe_type is None:
        config, format = {k: v for k, v in config.items() if k != "rpe_type"}, llama
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    plain = _write(tmp_path / "plain", config | {"vocab_size": PIECES}, tensors, spm)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        more = np.full((rows - PIECES, WIDTH), 1e3, np.float32)
        tensors[name] = np.concatenate([tensors[name], more])
    padded = _write(tmp_path / "padded", config, tensors, spm)
    for source in (plain, padded):
        incoming.convert(source, f"{source}/ours", format)
    expected, found = (bipe_jax.load(f"{source}/ours") for source in (plain, padded))
    assert found[0] == expected[0] and found[0].model.vocab_size == PIECES
    assert _params_equal(found[1], expected[1])
    says = (
        f"the model has {rows:,} token ids and the tokenizer {PIECES} pieces: the ids from {PIECES}"
    )
    assert capsys.readouterr().err.count(says) == 1


def test_a_model_of_ours_that_grew_in_transformers_comes_back(converted, tmp_path):
    """As after resize_token_embeddings: config.json has the new number, the key bipe_jax the old."""
    to_hf.convert(converted["ours"], str(tmp_path / "hf"))
    tensors = load_file(tmp_path / "hf/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.concatenate([tensors[name], tensors[name][:1]])
    save_file(tensors, tmp_path / "hf/model.safetensors")
    _set(vocab_size=PIECES + 1)(tmp_path / "hf")
    incoming.convert(str(tmp_path / "hf"), tmp_path / "back", from_hf)
    assert _params_equal(bipe_jax.load(tmp_path / "back")[1], bipe_jax.load(converted["ours"])[1])


@pytest.mark.parametrize("rows", [PIECES - 1, PIECES + 129])
def test_a_tokenizer_of_another_size_is_refused(rows, tmp_path, spm):
    config, tensors = _theirs("rope", rows=16, vocab_size=rows)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.resize(tensors[name], (rows, WIDTH))
    source = _write(tmp_path / "source", config, tensors, spm)
    with pytest.raises(UserError, match=f"has 900 pieces, but the model's vocab_size is {rows}"):
        incoming.convert(source, tmp_path / "ours", authors)


_ABSURD = (10**9, 10**30, -1, 0, 2.5, "2", True, [3], {}, float("nan"))


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
     "num_key_value_heads", "train_scale", "head_dim"],
)  # fmt: skip
@pytest.mark.parametrize("value", _ABSURD, ids=str)
def test_absurd_numbers_are_refused_at_once(key, value, converted, tmp_path):
    shutil.copytree(converted["source"], tmp_path / "source")
    _set(**{key: value})(tmp_path / "source")
    with pytest.raises(UserError) as raised:
        incoming.convert(str(tmp_path / "source"), tmp_path / "ours", authors)
    assert "\n" not in str(raised.value) and "source" in str(raised.value)
    assert not (tmp_path / "ours").exists()


def _hub(directory, source):
    """The source as Hugging Face's cache has it: links from a snapshot to blobs."""
    snapshot = directory / "models--x--y" / "snapshots" / "abc"
    blobs = directory / "models--x--y" / "blobs"
    os.makedirs(snapshot)
    os.makedirs(blobs)
    for number, name in enumerate(os.listdir(source)):
        shutil.copy(os.path.join(source, name), blobs / str(number))
        os.symlink(f"../../blobs/{number}", snapshot / name)
    return snapshot


def test_links_of_hugging_faces_cache_are_followed(converted, tmp_path):
    snapshot = _hub(tmp_path, converted["source"])
    incoming.convert(str(snapshot), tmp_path / "ours", authors)
    older = tmp_path / "local_dir"  # links into the cache
    older.mkdir()
    for name in os.listdir(snapshot):
        os.symlink(os.path.realpath(snapshot / name), older / name)
    incoming.convert(str(older), tmp_path / "too", authors)
    assert _params_equal(bipe_jax.load(tmp_path / "ours")[1], bipe_jax.load(tmp_path / "too")[1])


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "{tmp_path}/outside.safetensors", "a/../../outside.safetensors", "",
     ".", "..", "link.safetensors", "fifo.safetensors", "device.safetensors", "linked/x.safetensors",
     "a\0b", "a\nb", "\ud800", "x" * 5000],
)  # fmt: skip
def test_an_index_names_files_of_its_directory_alone(name, converted, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(converted["source"], source)
    os.rename(source / "model.safetensors", tmp_path / "outside.safetensors")
    os.symlink("../outside.safetensors", source / "link.safetensors")
    os.mkfifo(source / "fifo.safetensors")
    os.symlink("/dev/zero", source / "device.safetensors")
    os.symlink("..", source / "linked")
    index = {"weight_map": {"a": name.format(tmp_path=tmp_path)}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="source") as raised:
        incoming.convert(str(source), tmp_path / "ours", authors)
    assert "\n" not in str(raised.value) and not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.model", "model.safetensors", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_files_of_a_source_are_regular_and_its_own(name, kind, converted, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(converted["source"], source)
    if "index" in name:
        os.rename(source / "model.safetensors", source / name)
    os.rename(source / name, tmp_path / "outside")
    {
        "link": lambda: os.symlink("../outside", source / name),
        "fifo": lambda: os.mkfifo(source / name),
        "directory": lambda: os.mkdir(source / name),
    }[kind]()
    with pytest.raises(UserError, match=r"is a link out of its dir|must be a regular") as raised:
        incoming.convert(str(source), tmp_path / "ours", authors)
    assert "\n" not in str(raised.value)
