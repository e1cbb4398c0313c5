"""Checkpoints of ours -> transformers -> ours.

The first tests compare what is loaded in transformers with float64 NumPy and with our own decoding; they
need the extra `hf`. Round trips and faults need nothing beside the package.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import mistral_common
import numpy as np
import numpy_reference as reference
import pytest
import sentencepiece
from safetensors.numpy import load_file
from tiny import ENCODINGS, tiny_plan

from bipe_jax import checkpoint, segments
from bipe_jax.convert import from_hf, incoming, llama, to_hf
from bipe_jax.data import tokenizer
from bipe_jax.errors import UserError
from bipe_jax.evaluation import decode, loaded
from bipe_jax.positions import registry
from tests.model.test_model import draw

VOCAB, SEPARATORS = 512, (1, 2, 7)
LETTERS = ["\n" if i in SEPARATORS else chr(97 + i % 26) for i in range(VOCAB)]
NEW = 10  # tokens that are generated
BILEVEL = {"position__absolute": (("learned", "offset", ("size", 6)),)}
NOT_EXPORTED = ("t5", "kerple-log", "fire", "fox", "pope", "ssmax")  # modeling_bipe.py lacks them
CASES = {
    **{
        name: {"position__absolute": absolute, "position__relative": relative}
        for name, (absolute, relative) in ENCODINGS.items()
    },
    "three levels": {
        "position__absolute": (("learned", "offset"), ("sinusoidal", "segment", ("theta", 99.0))),
        "position__relative": (("rope", "segment"), ("alibi", "position"), ("alibi", "segment")),
        "model__heads": 6,  # ALiBi's slopes are completed
        "model__kv_heads": 2,
        "model__width": 36,
    },
    "nested levels": {
        "position__absolute": (("learned", "segment_in_paragraph"), ("sinusoidal", "part_offset")),
        "position__relative": (("rope", "segment"), ("alibi", "paragraph"), ("alibi", "part")),
        "segments__levels": (("paragraph", "regex:[a-z][b-z]*\n"), ("part", "before:\n[aeiou]")),
    },
    "fixed rule, grouped heads, tied": {
        **BILEVEL,
        "position__relative": (("rope", "segment", ("theta", 50.0)),),
        "segments__rule": "fixed:5",
        "model__kv_heads": 2,
        "model__tied_output": True,
    },
    "qk-norm, soft-cap, grouped heads": {
        "position__absolute": (),
        "position__relative": (("rope", "position"),),
        "model__kv_heads": 2,
        "model__qk_norm": True,
        "model__logit_softcap": 2.0,
    },
    "Llama, grouped heads, tied": {
        "position__absolute": (),
        "position__relative": (("rope", "position", ("theta", 500.0)),),
        "model__kv_heads": 2,
        "model__tied_output": True,
    },
    **{
        f"rope, {scaling}": {
            **BILEVEL,
            "position__relative": (
                (
                    "rope",
                    "segment",
                    ("scaling", scaling),
                    ("factor", 4.0),
                    *((("original", 3.0),) if scaling in ("dynamic-ntk", "yarn") else ()),
                ),
            ),
        }
        for scaling in ("linear", "ntk", "dynamic-ntk", "yarn")
    },
}
PLAIN = ("rope", "Llama, grouped heads, tied")  # those that become an ordinary Llama
EVERY = pytest.mark.parametrize("case", CASES)


@functools.cache
def built(case):
    overrides = {"model__vocab_size": VOCAB, "separators": SEPARATORS} | CASES[case]
    config = tiny_plan(**overrides)
    if config.segments.levels:
        config = config.with_rule(segments.rule_of(config, LETTERS, -1))
    return config, draw(config)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer_file):
    """A case's checkpoint and what `to_hf` makes of it, made at the first use."""

    @functools.cache
    def export(case) -> tuple[Path, Path]:
        directory = tmp_path_factory.mktemp("hf")
        workdir, out = directory / "run", directory / "out"
        checkpoint.save_model(workdir, *built(case), tokenizer.load(tokenizer_file))
        to_hf.convert(str(workdir), str(out))
        return workdir, out

    return export


@pytest.fixture(scope="module", autouse=True)
def modules_of_remote_code(tmp_path_factory):
    """transformers copies the code that it loads to the user's cache; here to a directory of ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")
        yield


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    return torch


@pytest.fixture(scope="module")
def load(exported, torch):
    """The model of a case in transformers."""
    import transformers

    @functools.cache
    def load(case):
        trust = case not in PLAIN or None
        return transformers.AutoModelForCausalLM.from_pretrained(
            exported(case)[1], trust_remote_code=trust
        )

    return load


def prompts_of(seed, *lengths):
    rng = np.random.default_rng(seed)
    return [
        np.where(rng.random(n) < 0.3, rng.choice(SEPARATORS, n), rng.integers(8, VOCAB, n))
        for n in lengths
    ]


def padded(torch, prompts, side="left"):
    """A batch, padded with a separator, which ends no segment there."""
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), SEPARATORS[0])
    mask = np.zeros_like(ids)
    for row, seen, prompt in zip(ids, mask, prompts, strict=True):
        place = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        row[place], seen[place] = prompt, 1
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def generate(model, inputs, **options):
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": NEW} | options
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].numpy()


def wanted_logits(model, tokens):
    """(L, V) float64, by plain loops."""
    config, params = model
    inputs = {"tokens": tokens, **segments.coordinates(tokens, config.segment_rule)}
    return reference.logits(config, params, {n: x[None] for n, x in inputs.items()})[0]


@EVERY
def test_logits(case, load, torch):
    """Rows of different lengths, padded left and right, longer than training, against float64."""
    prompts = prompts_of(0, 45, 1, 20, 33)
    for side in ("left", "right"):
        inputs = padded(torch, prompts, side)
        with torch.no_grad():
            logits = load(case)(**inputs).logits.numpy()
        real = inputs["attention_mask"].bool().numpy()
        for row, keep, prompt in zip(logits, real, prompts, strict=True):
            np.testing.assert_allclose(
                row[keep], wanted_logits(built(case), prompt), atol=1e-4, rtol=0
            )


@EVERY
def test_generate(case, load, torch):
    """A padded batch, and a prompt alone, give what whole forward passes give."""
    prompts = prompts_of(1, 30, 5, 17)
    answers = []
    for prompt in prompts:
        text = prompt
        for _ in range(NEW):
            text = np.append(text, wanted_logits(built(case), text)[-1].argmax())
        answers.append(text[len(prompt) :].tolist())
    assert len({token for answer in answers for token in answer}) > 5  # no trivial loop
    assert generate(load(case), padded(torch, prompts)).tolist() == answers
    one = {"input_ids": torch.tensor(prompts[1][None])}
    assert generate(load(case), one)[0].tolist() == answers[1]


@pytest.mark.parametrize("case", ["bipe_rope", "bipe_alibi", "rope"])
def test_generate_as_we_decode(case, load, torch):
    prompts = prompts_of(2, 60, 21)
    ours = decode.Generator(loaded.on_all_devices(*built(case)), 60 + 2 * NEW)
    answers = ours([p.astype(np.int32) for p in prompts], 2 * NEW)
    theirs = generate(load(case), padded(torch, prompts), max_new_tokens=2 * NEW)
    assert theirs.tolist() == [answer.tolist() for answer in answers]


@pytest.mark.parametrize("case", ["bipe_rope", "three levels", "fixed rule, grouped heads, tied"])
def test_ways_to_use_a_cache(case, load, torch):
    """Beams, samples and speculation move, drop and repeat what is in the cache."""
    model, inputs = load(case), padded(torch, prompts_of(2, 30, 5))
    beams = {"num_beams": 3, "num_return_sequences": 2}
    without = generate(model, inputs, use_cache=False, **beams)
    assert np.array_equal(generate(model, inputs, **beams), without)
    draws = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        draws.append(generate(model, inputs, use_cache=use_cache, do_sample=True, top_k=20))
    assert np.array_equal(*draws)
    text = prompts_of(3, 12)[0]
    one = {"input_ids": torch.tensor(np.tile(text, 2)[None])}  # so that looking up finds something
    looked_up = generate(model, one, prompt_lookup_num_tokens=4)
    assert np.array_equal(looked_up, generate(model, one))


def test_pieces_are_as_the_whole(load, torch):
    """A cache filled in several passes, with and without the mask in the later ones."""
    model = load("three levels")
    inputs = padded(torch, prompts_of(4, 30, 11))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        whole = model(**inputs).logits
        for later in (mask, None):
            cache, parts = None, []
            for start, end in ((0, 20), (20, 21), (21, 28), (28, 30)):
                seen = mask[:, :end] if start == 0 or later is not None else None
                found = model(
                    ids[:, start:end],
                    attention_mask=seen,
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = found.past_key_values
                parts.append(found.logits)
            real = mask.bool()
            torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], atol=1e-5, rtol=0)
    assert cache.get_seq_length() == 30


def test_half_precision(load, torch, exported):
    """Angles of hundreds of segments, which have no digit behind the point in bfloat16."""
    import transformers

    case = "three levels"
    half = transformers.AutoModelForCausalLM.from_pretrained(
        exported(case)[1], trust_remote_code=True, dtype=torch.bfloat16
    )
    ids = torch.tensor(np.stack(prompts_of(5, 1000, 1000)))
    with torch.no_grad():
        exact = load(case)(ids).logits
        rounded = half(ids).logits.float()
        with torch.autocast("cpu", torch.bfloat16):
            autocast = load(case)(ids).logits.float()
    for found in (rounded, autocast):
        assert (found - exact).std() / exact.std() < 0.03


def test_plain_rope_is_a_llama(load, exported):
    for case in PLAIN:
        assert type(load(case)).__name__ == "LlamaForCausalLM"
        assert not (exported(case)[1] / "modeling_bipe.py").exists()


def test_training_on_and_back(load, torch, exported, tmp_path):
    """Loss and gradients for the Trainer; what save_pretrained writes comes back."""
    import transformers

    for case in ("fixed rule, grouped heads, tied", "rope"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            exported(case)[1], trust_remote_code=True
        )
        ids = torch.tensor(np.stack(prompts_of(6, 20, 20)))
        result = model(ids, labels=ids)
        chosen = torch.log_softmax(result.logits[:, :-1], -1).gather(2, ids[:, 1:, None])
        torch.testing.assert_close(result.loss, -chosen.mean())
        result.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        torch.optim.SGD(model.parameters(), 0.1).step()
        out = tmp_path / case
        model.save_pretrained(out)
        tokens = transformers.AutoTokenizer.from_pretrained(
            exported(case)[1], trust_remote_code=True
        )
        tokens.save_pretrained(out)
        incoming.convert(str(out), str(tmp_path / f"{case} back"), from_hf)
        meta, params = checkpoint.load(tmp_path / f"{case} back")
        with torch.no_grad():
            logits = model(ids).logits[0].numpy()
        wanted = wanted_logits((meta.config, params), ids[0].numpy())
        np.testing.assert_allclose(logits, wanted, atol=1e-4, rtol=0)


def test_what_the_model_refuses(load, torch):
    model = load("bipe_rope")
    ids = torch.tensor(prompts_of(7, 8)[0][None])
    with pytest.raises(ValueError, match="position_ids must count the tokens"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))
    with pytest.raises(ValueError, match="give input_ids: coordinates follow from tokens"):
        model(inputs_embeds=torch.zeros(1, 8, 32))
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 5\), but .* \(1, 8\)"):
        model(ids, attention_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="neither attentions nor hidden states"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="only a DynamicCache"):
        generate(model, {"input_ids": ids}, cache_implementation="static")
    with pytest.raises(ValueError, match="dynamic-ntk"):
        generate(load("rope, dynamic-ntk"), {"input_ids": ids}, use_cache=True)


def test_a_learned_table_of_positions_ends(torch, tmp_path, tokenizer_file):
    import transformers

    config = tiny_plan(
        model__vocab_size=VOCAB,
        position__absolute=(("learned", "position"),),
        position__relative=(),
    )
    spm = tokenizer.load(tokenizer_file)
    checkpoint.save_model(tmp_path / "run", config, draw(config), spm)
    to_hf.convert(str(tmp_path / "run"), str(tmp_path / "out"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True
    )
    with pytest.raises(ValueError, match=r"ends at 16 tokens: .* nothing for 17 tokens"):
        model(torch.ones(1, 17, dtype=torch.long))


# Spaces, newlines, digits, control tokens spelled out, bytes, runs with equally probable pieces.
TEXTS = (
    "",
    "\n",
    " ",
    "  two  spaces \n\n lines\r\n\ttab ",
    "<s> literal </s> <0x0A> <unk>",
    "naïve 日本語 \U0001f600 \ufb01 ½ \u00a0\u2028 \ufeff",
    "12345 3.14 v2.0",
    "a" * 50 + " " * 37 + "=" * 30 + "-" * 41,
    "▁under▁score",
)


def without_bos(directory, texts) -> Path:
    """A tokenizer whose documents begin with EOS."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts).splitlines()), model_prefix=str(directory / "eos"),
        vocab_size=VOCAB, bos_id=-1, unk_id=0, eos_id=1, byte_fallback=True, character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return directory / "eos.model"


@pytest.mark.parametrize("kind", ["unigram", "bpe", "without BOS"])
@pytest.mark.parametrize("trust", [True, None])
def test_tokenizer(kind, trust, torch, tmp_path, tokenizer_file, texts):
    """Ours, trained by bipe_jax, and Mistral's, of Llama's kind; in a Llama's directory too."""
    import transformers

    path = tokenizer_file
    if kind == "bpe":
        path = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    if kind == "without BOS":
        path = without_bos(tmp_path, texts)
    ours = tokenizer.load(str(path))
    case = "rope" if kind == "bpe" else "bipe_rope"
    first = "</s>" if kind == "without BOS" else "<s>"
    config = tiny_plan(**{"model__vocab_size": ours.vocab_size} | CASES[case])
    checkpoint.save_model(tmp_path / "run", config, draw(config), ours)
    to_hf.convert(str(tmp_path / "run"), str(tmp_path / "out"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=trust)
    assert len(theirs) == ours.vocab_size
    for text in (*TEXTS, *texts[:8]):
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids.tolist()
        if trust:
            plain = ours.decode(ids)
            assert theirs.decode(ids, skip_special_tokens=True) == plain
            # Spelt out, as others read contexts and ends from it.
            assert theirs.decode([*ids, ours.bos_id]) == f"{first}{plain}{first}"
    batch = theirs(["one", "some more words"], padding=True)
    assert batch["attention_mask"][0][0] == 0 and batch["attention_mask"][0][-1] == 1


def test_alone(torch, exported, tmp_path):
    """The directory is enough, in a process that cannot import bipe_jax."""
    program = """
import sys
sys.modules["bipe_jax"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
answer = model.generate(**tokenizer(["A line.\\nAnd", "So"], padding=True, return_tensors="pt"))
print(answer.shape[0], type(model).__name__)
"""
    line = [sys.executable, "-c", program, str(exported("bipe_alibi")[1])]
    run = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "2 BipeForCausalLM\n", run.stderr


@EVERY
def test_there_and_back(case, exported, tmp_path):
    """Config, parameters and tokenizer, bit for bit."""
    workdir, out = exported(case)
    incoming.convert(str(out), str(tmp_path / "back"), from_hf)
    (before, params), (after, back) = checkpoint.load(workdir), checkpoint.load(tmp_path / "back")
    assert after.config == before.config
    assert after.tokenizer.model == before.tokenizer.model
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        assert one.dtype == other.dtype == np.float32
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_shards(exported, tmp_path):
    """Tensors beyond a file's size go to the next, in any split the same tensors."""
    workdir, out = exported("three levels")
    to_hf.convert(str(workdir), str(tmp_path / "out"), shard_bytes=50_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 3
    assert not (tmp_path / "out/model.safetensors").exists()
    whole = load_file(out / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    for file in files:
        part = load_file(tmp_path / "out" / file)
        assert len(part) == 1 or sum(x.nbytes for x in part.values()) <= 50_000
        for name, tensor in part.items():
            assert index["weight_map"][name] == file
            assert np.array_equal(tensor, whole.pop(name))
    assert not whole
    incoming.convert(str(tmp_path / "out"), str(tmp_path / "back"), from_hf)


@pytest.mark.slow
def test_command(exported, tmp_path, command):
    workdir, _ = exported("fixed rule, grouped heads, tied")
    out, back = tmp_path / "deep" / "out", tmp_path / "back"
    for name, source, destination in (("to-hf", workdir, out), ("from-hf", out, back)):
        run = command("convert", name, str(source), str(destination))
        assert run.returncode == 0, run.stderr
        assert run.stderr.startswith("Wrote ") and run.stderr.count("\n") == 1
    assert (back / "checkpoints/0/params").is_dir()
    assert os.listdir(out.parent) == ["out"]
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1
    again = command("convert", "to-hf", str(workdir), str(out))
    assert again.returncode == 1
    assert again.stderr.startswith(f"error: {out} is there already, and not empty")
    assert again.stderr.count("\n") == 1


def test_destinations(exported, tmp_path, monkeypatch):
    workdir, _ = exported("nope")
    file, empty, half = tmp_path / "file", tmp_path / "empty", tmp_path / "half"
    file.touch()
    empty.mkdir()
    with pytest.raises(UserError, match="file is there already"):
        to_hf.convert(str(workdir), str(file))
    with pytest.raises(UserError, match="local directories"):
        to_hf.convert(str(workdir), "gs://bucket/out")
    with pytest.raises(UserError, match="no such directory"):
        to_hf.convert(str(tmp_path / "nothing"), str(half))
    to_hf.convert(str(workdir), f"{empty}/")
    assert (empty / "config.json").exists()

    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_hf, "save_file", disk_full)
    with pytest.raises(UserError, match=r"writing .*half failed \(.*No space left"):
        to_hf.convert(str(workdir), str(half))
    assert sorted(os.listdir(tmp_path)) == ["empty", "file"]
    (tmp_path / "half.unfinished").mkdir()
    with pytest.raises(UserError, match=r"half\.unfinished is there already"):
        to_hf.convert(str(workdir), str(half))


def test_what_cannot_be_converted(monkeypatch):
    """A kind or an option that the package has and modeling_bipe.py has not."""
    config = built("alibi")[0]
    for kind in NOT_EXPORTED:
        other = config.replace({"position.relative": ((kind, "position"),)})
        with pytest.raises(UserError, match=f"the encoding '{kind}' of 'position' cannot be"):
            to_hf.encodings_of(other)

    class Other(registry.RELATIVE["alibi"]):
        options = {"slope_scale": float, "bend": float}

        @staticmethod
        def check(config, coordinate, *, bend=0.0):
            pass

    monkeypatch.setitem(registry.RELATIVE, "alibi", Other)
    bent = (("alibi", "position", ("bend", 1.0)),)
    config = config.replace({"position.relative": bent})
    with pytest.raises(UserError, match="the option 'bend' of 'alibi' cannot be converted"):
        to_hf.encodings_of(config)


@pytest.mark.parametrize(
    "theirs, command",
    [
        ({"model_type": "llama"}, "use from-llama$"),
        ({"model_type": "llama", "rpe_type": "rope"}, "use from-authors$"),
        ({"model_type": "gpt2"}, "use from-llama or from-authors$"),
    ],
)
def test_what_from_hf_refuses(theirs, command):
    with pytest.raises(UserError, match=f"^config.json has no config of ours .* {command}"):
        from_hf.config_of(theirs, "config.json")


def test_a_plain_rope_comes_back_as_a_llama_too(exported, tmp_path):
    out = exported("rope")[1]
    incoming.convert(str(out), str(tmp_path / "back"), llama)
    assert checkpoint.load(tmp_path / "back")[0].config.position.relative == (
        ("rope", "position", ("theta", 10000.0)),
    )
