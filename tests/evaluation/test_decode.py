"""Decoding: token by token what the whole forward pass gives; draws; errors; the command."""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from paths import ROOT
from tiny import ENCODINGS, tiny_plan

import bipe_jax
from bipe_jax import checkpoint, generate, segments
from bipe_jax import model as models
from bipe_jax.errors import UserError
from bipe_jax.evaluation import caching, decode, loaded, room
from bipe_jax.evaluation.decode import Generator
from bipe_jax.evaluation.sampling import Sampling, probabilities
from bipe_jax.positions import NAMED, registry
from bipe_jax.positions.rope import Rope
from tests.model.test_model import draw, draw_tokens

CASES = {
    **{
        name: {"position__absolute": absolute, "position__relative": relative}
        for name, (absolute, relative) in (ENCODINGS | {"t5": NAMED["t5"]}).items()
    },
    "three levels": {
        "position__absolute": (("learned", "offset"), ("sinusoidal", "segment")),
        "position__relative": (("rope", "segment"), ("alibi", "position"), ("alibi", "segment")),
    },
    "fixed rule, grouped heads, tied": {
        "position__absolute": (("learned", "offset"),),
        "position__relative": (("rope", "segment"),),
        "segments__rule": "fixed:5",
        "model__kv_heads": 2,
        "model__tied_output": True,
    },
}
PROMPTS = [draw_tokens(i, 1, n)[0].astype(np.int32) for i, n in enumerate((1, 37, 16, 20, 8))]
NEW = 12


@functools.cache
def model_of(case):
    config = tiny_plan(**CASES[case])
    return loaded.on_all_devices(config, draw(config))


def full_logits(model, tokens):
    """(L, V) float64, by plain loops."""
    tokens = np.asarray(tokens)[None]
    inputs = {"tokens": tokens, **segments.coordinates(tokens, model.rule)}
    return reference.logits(model.config, model.params, inputs)[0]


@pytest.mark.parametrize("case", CASES)
def test_every_token_gets_the_logits_of_the_whole_forward_pass(case, monkeypatch):
    """Prompts of different lengths, read in several pieces, then token by token."""
    monkeypatch.setattr(decode, "PIECE", 16)
    model = model_of(case)
    generator = Generator(model, 60)
    found = [[] for _ in PROMPTS]
    logits, cache = generator._prefill(PROMPTS)
    texts = [list(p) for p in PROMPTS]
    for _ in range(NEW):
        for i, row in enumerate(np.asarray(logits)):
            found[i].append(row)
            texts[i].append(int(row.argmax()))
        tokens = jnp.asarray([text[-1] for text in texts], jnp.int32)
        logits, cache = generator._step(model.params, model.rule, cache, tokens)
    for prompt, text, rows in zip(PROMPTS, texts, found, strict=True):
        wanted = full_logits(model, text[:-1])[len(prompt) - 1 :]
        np.testing.assert_allclose(rows, wanted, atol=3e-5, rtol=3e-5)
    answers = generator(PROMPTS, NEW)
    for prompt, text, answer in zip(PROMPTS, texts, answers, strict=True):
        assert answer.tolist() == text[len(prompt) :]


def test_an_encoding_that_depends_on_later_tokens_is_computed_anew(monkeypatch):
    """`cacheable` says that a token's angles may be kept."""

    class Stretched(Rope):
        cacheable = False

        def features(self, coordinate, x=None, before=None):
            seen = coordinate.max(axis=-1, keepdims=True) + 1
            cos, sin = super().features(coordinate)
            return cos * jnp.exp(-seen / 20)[..., None, None], sin

    monkeypatch.setitem(registry.RELATIVE, "rope", Stretched)
    config = tiny_plan(**CASES["bipe_rope"])
    model = loaded.on_all_devices(config, draw(config))
    forward = jax.jit(functools.partial(bipe_jax.apply, config))
    prompts = [np.append(prompt, 1) for prompt in PROMPTS[2:4]]  # padding would be new segments
    for prompt, answer in zip(prompts, Generator(model, 60)(prompts, 3), strict=True):
        text = list(prompt)
        for token in answer:
            logits = forward(model.params, np.asarray(text)[None])
            assert token == int(logits[0, -1].argmax())
            text.append(int(token))


def test_one_program_serves_all_prompts_up_to_a_bucket():
    model = model_of("bipe_rope")
    generator = Generator(model, 90)
    for length in (33, 40, 64):
        generator([draw_tokens(0, 1, length)[0]], 5)
    assert generator._extend._cache_size() == generator._step._cache_size() == 1
    assert generator.size == 96
    assert [caching.bucket(n) for n in (1, 64, 65, 96, 97, 128, 129, 193)] == [
        64, 64, 96, 96, 128, 128, 192, 256,
    ]  # fmt: skip


def plain_probabilities(sampling, logits):
    """Of one row, in float64, token by token."""
    scaled = np.asarray(logits, np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    kept = order[: sampling.top_k or None]
    total, nucleus = 0.0, []
    whole = sum(weights[i] for i in kept)
    for i in kept:
        nucleus.append(i)
        total += weights[i] / whole
        if total >= sampling.top_p:
            break
    found = np.zeros(len(weights))
    found[nucleus] = weights[nucleus] / weights[nucleus].sum()
    return found


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.6), Sampling(1.3, 5), Sampling(0.9, 0, 0.7), Sampling(1.0, 8, 0.5),
     Sampling(1.0, 0, 1e-6), Sampling(1.0, 1)],
)  # fmt: skip
def test_probabilities_equal_a_plain_loop(sampling):
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 2, (4, 30)), jnp.float32)
    found = probabilities(sampling, logits)
    for row, wanted in zip(found, logits, strict=True):
        np.testing.assert_allclose(row, plain_probabilities(sampling, wanted), atol=1e-6)


def test_draws_follow_the_probabilities_and_the_seed():
    model, sampling = model_of("rope"), Sampling(0.8, 10, 0.9)
    prompt = PROMPTS[3]
    generator = Generator(model, 60)
    firsts = np.array(
        [generator([prompt] * 16, 1, sampling=sampling, seed=seed) for seed in range(60)]
    ).ravel()
    chances = plain_probabilities(sampling, full_logits(model, prompt)[-1])
    counts = np.bincount(firsts, minlength=64)
    assert not counts[chances == 0].any()
    spread = np.sqrt(chances * (1 - chances) / len(firsts))
    assert (np.abs(counts / len(firsts) - chances) <= 4.5 * spread).all()

    one = generator([prompt, prompt], 8, sampling=sampling, seed=3)
    again = generator([prompt, PROMPTS[1]], 8, sampling=sampling, seed=3)
    assert one[0].tolist() == again[0].tolist()  # whatever the other rows are
    assert one[0].tolist() != one[1].tolist()
    assert one[0].tolist() != generator([prompt], 8, sampling=sampling, seed=4)[0].tolist()
    # Draws of one row too: of nearly equal chances (1/64 each), 40 give 30 tokens or so.
    (even,) = generator([prompt], 40, sampling=Sampling(1e6))
    assert len(set(even.tolist())) > 20


@pytest.mark.parametrize("spec", ["ntk:4", "yarn:4:6", "dynamic-ntk:2:6"])
def test_an_extended_model_decodes_as_its_config_says(run, spec):
    model = loaded.load(run, spec)
    kind, coordinate, *options = model.config.position.relative[0]
    assert (kind, coordinate, dict(options)["scaling"]) == ("rope", "segment", spec.split(":")[0])
    prompt = model.tokenizer.encode("To be\nor not\nto be. " * 4)
    (answer,) = Generator(model, 100)([prompt], 3)
    forward = jax.jit(functools.partial(bipe_jax.apply, model.config))
    text = list(prompt)
    for token in answer:
        assert token == int(forward(model.params, np.asarray(text)[None])[0, -1].argmax())
        text.append(int(token))


def test_rows_end_before_their_stop_tokens():
    generator = Generator(model_of("bipe_alibi"), 60)
    whole = [answer.tolist() for answer in generator(PROMPTS, NEW)]
    stop = frozenset({whole[0][3], whole[1][5]})
    for answer, cut in zip(whole, generator(PROMPTS, NEW, stop=stop), strict=True):
        end = next((i for i, token in enumerate(answer) if token in stop), NEW)
        assert cut.tolist() == answer[:end]
    everything = frozenset(range(64))
    assert [a.tolist() for a in generator(PROMPTS, NEW, stop=everything)] == [[]] * len(PROMPTS)


def test_wrong_input_is_refused_by_name():
    generator = Generator(model_of("rope"), 60)
    for prompts, count, line in (
        ([], 1, "no prompt"),
        ([PROMPTS[0], np.zeros(0, np.int32)], 1, "prompt 1 is empty"),
        ([PROMPTS[0], np.zeros(55, np.int32)], 6, "prompt 1 has 55 tokens, .*=6 .* cache of 60"),
        ([np.array([64])], 1, r"outside of 0 … 63"),
        (PROMPTS, 0, "max_new_tokens=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=line):
            generator(prompts, count)
    for sampling, line in (
        (Sampling(-1.0), "temperature=-1.0 must be"),
        (Sampling(1.0, -1), "top_k=-1 must be"),
        (Sampling(1.0, 0, 0.0), "top_p=0.0 must be"),
        (Sampling(1.0, 0, 1.5), "top_p=1.5 must be"),
    ):
        with pytest.raises(UserError, match=line):
            generator(PROMPTS, 1, sampling=sampling)
    for seed in (-1, 1 << 32):
        with pytest.raises(UserError, match=f"seed={seed} must be from 0"):
            generator(PROMPTS, 1, seed=seed)
    config = tiny_plan(position__absolute=(("learned", "position"),), position__relative=())
    model = loaded.on_all_devices(config, draw(config))
    with pytest.raises(UserError, match="table of position ends at 16 tokens"):
        Generator(model, 17)
    Generator(model, 16)([PROMPTS[4]], 8)


def test_eight_devices_give_what_one_gives():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}",
    }
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    devices, answers = json.loads(done.stdout)
    assert devices == 8
    assert answers == [a.tolist() for a in Generator(model_of("three levels"), 60)(PROMPTS, NEW)]


@pytest.mark.slow
def test_the_command_streams_text_and_refuses_wrong_input(run, command, tmp_path):
    prompt = "To be, or not to be\n"
    arguments = ("generate", f"--checkpoint={run}", f"--prompt={prompt}", "--max_new_tokens=20")
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    model = loaded.load(run)
    tokens = model.tokenizer.encode(prompt)
    answer = Generator(model, 200)([tokens], 20, stop=model.tokenizer.ends)[0]
    assert done.stdout == model.tokenizer.decode([*tokens, *answer]) + "\n"
    drawn = [command(*arguments, "--temperature=1", f"--seed={s}").stdout for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(text.startswith(prompt) for text in drawn)
    for extra, line in (
        ("--top_p=2", "error: top_p=2.0 must be above 0 and at most 1\n"),
        ("--max_new_tokens=0", "error: max_new_tokens=0 must be at least 1\n"),
        (f"--checkpoint={tmp_path}", "no complete checkpoint"),
        (b"--prompt=\xff", "error: --prompt is not UTF-8"),
    ):
        done = command(*arguments, extra)
        assert done.returncode == 1 and not done.stdout
        assert line in done.stderr and done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("count", [10**8, 99_999_999_999, 10**30])
def test_an_answer_that_no_memory_holds_is_refused(run, command, count):
    arguments = ("generate", f"--checkpoint={run}", "--prompt=To be", f"--max_new_tokens={count}")
    done = command(*arguments)
    assert done.returncode == 1 and not done.stdout
    assert re.fullmatch(r"error: a text of [\d,]+ tokens needs .* use fewer tokens\n", done.stderr)


def test_the_cache_is_of_the_size_that_is_expected():
    """Of every dtype and encoding: what is refused is what would be allocated."""
    for name in ("bipe_rope", "t5", "three levels", "fixed rule, grouped heads, tied"):
        model = model_of(name)
        shapes = jax.eval_shape(
            lambda model=model: caching.empty_cache(model.config, 1, 128)["layers"]
        )
        sizes = [shapes[part].size * shapes[part].dtype.itemsize for part in ("key", "value")]
        assert sum(sizes) == 128 * room.bytes_per_token(model.config)


def test_more_of_the_top_than_there_are_is_all(run):
    logits = jnp.arange(8.0)[None]
    found = [probabilities(Sampling(1.0, top_k=k), logits) for k in (0, 8, 10**30)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    np.testing.assert_array_equal(found[1], found[2])


def generated(path, prompt, count):
    return "".join(generate.generate(path, prompt, count, Sampling()))


def test_a_learned_table_of_position_is_used_to_its_last_row(tmp_path, run):
    """The cache may be larger than what the model can read."""
    trained = loaded.load(run)
    config = trained.config.replace(
        {"position.absolute": (("learned", "position"),), "position.relative": ()}
    )
    params = models.init(config, jax.random.key(0))
    path = str(tmp_path / "model")
    checkpoint.save_model(path, config, params, trained.tokenizer)
    left = config.sequence_length - len(trained.tokenizer.encode("To be"))
    generated(path, "To be", left)
    with pytest.raises(UserError, match=r"ends at 32 tokens: .* length 33"):
        generated(path, "To be", left + 1)


def test_a_text_that_ends_within_a_character_is_given_whole(run, monkeypatch):
    tokenizer = loaded.load(run).tokenizer
    byte = {text: tokenizer._processor.piece_to_id(text) for text in ("<0xC3>", "<0xA9>")}
    for given, wanted in (([0xC3], "\ufffd"), ([0xC3, 0xA9], "é"), ([0xC3, 0xA9, 0xC3], "é\ufffd")):
        ids = [byte[f"<0x{value:X}>"] for value in given]
        stream = lambda *_, ids=ids, **__: ([i] for i in ids)  # noqa: E731
        monkeypatch.setattr(Generator, "stream", stream)
        assert generated(run, "To be", 8) == wanted


if __name__ == "__main__":
    model = model_of("three levels")
    answers = Generator(model, 60)(PROMPTS, NEW)
    print(json.dumps([jax.device_count(), [answer.tolist() for answer in answers]]))
