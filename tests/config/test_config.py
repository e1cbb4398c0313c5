"""Configs: every file is valid, every wrong value is refused by name, and JSON keeps them."""

import importlib
import json
import math

import pytest
from ml_collections import ConfigDict
from paths import ROOT
from tiny import tiny

from bipe_jax import config as configs
from bipe_jax import plan
from bipe_jax.config import FIELDS, check_resumable, from_json, spec, to_json
from bipe_jax.config.__main__ import reference
from bipe_jax.errors import UserError
from bipe_jax.positions import NAMED
from configs import base

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def with_value(name, value, config=None):
    """`config` with one field changed, whatever the type of the new value."""
    config = config or tiny()
    *groups, field = name.split(".")
    inner = config
    for group in groups:
        inner = inner[group]
    if field in inner:
        del inner[field]  # ConfigDict would convert what it can, such as True for a float
    inner[field] = value
    return config


def refusal(config) -> str:
    with pytest.raises(UserError) as caught:
        plan.make(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def names(plain: dict, prefix="") -> set[str]:
    found = set()
    for key, value in plain.items():
        found |= names(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid_and_survives_json(name):
    module = importlib.import_module(f"configs.{name}")
    encodings = NAMED if name in ("quickstart", "smoke") else getattr(module, "PATTERNS", ())
    for config in [module.get_config()] + [module.get_config(e) for e in encodings]:
        parsed = configs.parse(config)
        plan.of(parsed)
        assert from_json(json.loads(json.dumps(to_json(parsed)))) == parsed


def test_quickstart_encodings_differ_in_the_encoding_alone():
    quickstart = importlib.import_module("configs.quickstart")
    plain = []
    for encoding in NAMED:
        config = quickstart.get_config(encoding).to_dict()
        plain.append((config.pop("position"), config))
    assert all(rest == plain[0][1] for _, rest in plain)
    positions = [position for position, _ in plain]
    assert all(positions.count(position) == 1 for position in positions)


def test_an_unknown_pattern_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"llama5 is unknown .*: use one of llama4, smollm3"):
        importlib.import_module("configs.patterns_151m").get_config("llama5")


@pytest.mark.parametrize("name", ["quickstart", "smoke"])
def test_an_unknown_encoding_is_refused_with_those_there_are(name):
    with pytest.raises(
        UserError, match="rotary is unknown: use one of bipe_rope, bipe_alibi, rope"
    ):
        importlib.import_module(f"configs.{name}").get_config("rotary")


def test_every_field_of_base_is_checked_and_no_other():
    assert names(base.get_config().to_dict()) == set(FIELDS)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_field_of_the_wrong_type_is_refused_by_name(name):
    value = base.get_config().to_dict()
    for part in name.split("."):
        value = value[part]
    if isinstance(value, bool):
        wrong = [1, 0, None, "True"]
    elif isinstance(value, int):
        wrong = [True, 1.5, float(value), "1", None, math.nan, (1,)]
    elif isinstance(value, float):
        wrong = [True, "0.1", None, math.nan, math.inf, -math.inf, (0.1,)]
    elif isinstance(value, str):
        wrong = [1, None, True, ("quickstart",), math.nan]
    else:
        wrong = ["abc", 1, None, {"a": 1}, (math.nan,), ("a", 1), (True,), ((),), (None,)]
    for bad in wrong:
        assert name in refusal(with_value(name, bad)), bad


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_missing_field_is_named(name):
    config = tiny()
    group, _, field = name.rpartition(".")
    del (config[group] if group else config)[field]
    assert f"config.{name} is missing" in refusal(config)


@pytest.mark.parametrize("group", sorted({name.split(".")[0] for name in FIELDS if "." in name}))
def test_a_sub_config_cannot_be_replaced(group):
    config = tiny()
    del config[group]
    assert f"config.{group}." in refusal(config)
    for wrong in (3, None, "bipe", ("a",)):
        assert f"config.{group}=" in refusal(with_value(group, wrong))
    # A dict becomes a sub-config that lacks what it does not name.
    assert f"config.{group}." in refusal(with_value(group, {}))
    plain = tiny().to_dict()[group]
    assert f"config.{group}.other is unknown" in refusal(with_value(group, plain | {"other": 1}))


def test_a_group_may_be_a_plain_dict():
    config = ConfigDict(convert_dict=False)
    for name, value in tiny().items():
        config[name] = value.to_dict() if name == "model" else value
    assert plan.make(config) == plan.make(tiny()) == plan.make(tiny().to_dict())


@pytest.mark.parametrize("value", [3, None, "wide", (("layers", 2),)])
def test_a_group_that_is_none_is_refused(value):
    config = tiny().to_dict() | {"model": value}
    assert f"config.model={value!r} must be a ConfigDict" in refusal(config)


def test_nested_dicts_are_a_config():
    assert plan.make(tiny().to_dict()) == plan.make(tiny())


@pytest.mark.parametrize("name", ["stepz", "model.depth", "data.path", "position.rotary"])
def test_an_unknown_field_is_named(name):
    assert f"config.{name} is unknown" in refusal(with_value(name, 1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", -1),
        ("sequence_length", 1),
        ("seed", -1),
        ("seed", 2**32),
        ("model.layers", 0),
        ("model.dtype", "float16"),
        ("model.remat", "some"),
        ("model.norm_epsilon", 0.0),
        ("segments.rule", "word"),
        ("segments.rule", "fixed:0"),
        ("segments.rule", "fixed:"),
        ("data.sets", "Github"),
        ("data.sets", ("Github", 1)),
        ("data.max_bad_share", 1.01),
        ("data.shuffle_blocks", 0),
        ("optimizer.name", "sgd"),
        ("optimizer.learning_rate", 0.0),
        ("optimizer.beta1", 1.0),  # Adam divides by 1 - beta
        ("optimizer.beta2", 1.0),
        ("optimizer.beta2", -0.1),
        ("optimizer.weight_decay", -0.1),
        ("optimizer.no_decay", "norm/scale"),
        ("schedule.name", "constant"),
        ("schedule.final_fraction", 1.5),
        ("schedule.warmup_steps", -1),
        ("evaluation.lengths", (16, 1)),
        ("evaluation.lengths", (16, "32")),
        ("evaluation.lengths", 16),
        ("checkpoint.every", 0),
        ("mesh.fsdp", 0),
        ("mesh.tensor", 0),
        ("mesh.context", 1.0),
        ("model.attention", "flash"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    assert name in refusal(with_value(name, value))


@pytest.mark.parametrize("field", ["position.absolute", "position.relative", "position.draws"])
@pytest.mark.parametrize(
    "entries",
    [
        ("rope", "position"),  # a comma was forgotten
        ("rope",),
        (("rope",),),
        ((),),
        (None,),
        (("spiral", "position"),),
        ((["rope"], "position"),),
        (({}, "position"),),
        (("learned", "line"), ("rope", "line")),
        (("rope", ["position"]), ("learned", ["position"])),
        (("rope", "position", "theta"), ("sinusoidal", "position", "theta")),
    ],
)
def test_a_malformed_encoding_is_refused_by_name(field, entries):
    assert field in refusal(with_value(field, entries))


@pytest.mark.parametrize(
    ("field", "entry"),
    [
        ("absolute", ("rope", "position")),
        ("relative", ("learned", "offset")),
        ("absolute", ("learned", "line")),
        ("absolute", ("learned", "segment")),
        ("absolute", ("learned", "offset", ("size", 0))),
        ("absolute", ("learned", "offset", ("size", 8.0))),
        ("absolute", ("learned", "offset", ("size", True))),
        ("absolute", ("learned", "position", ("size", 8))),
        ("absolute", ("sinusoidal", "position", ("theta", 1))),
        ("absolute", ("sinusoidal", "position", ("theta", math.nan))),
        ("absolute", ("sinusoidal", "position", ("scale", math.inf))),
        ("relative", ("rope", "line")),
        ("relative", ("rope", "segment", ("base", 10.0))),
        ("relative", ("rope", "segment", ([], 10.0))),
        ("relative", ("rope", "segment", ("theta", "10"))),
        ("relative", ("rope", "segment", ("theta", math.nan))),
        ("relative", ("rope", "segment", ("theta", math.inf))),
        ("relative", ("alibi", "offset")),
        ("relative", ("alibi", "segment", ("slope_scale", 0.0))),
        ("relative", ("alibi", "segment", ("slope_scale", math.nan))),
    ],
)
def test_an_encoding_that_makes_no_sense_is_refused(field, entry):
    assert f"position.{field}" in refusal(tiny(**{f"position__{field}": (entry,)}))


def test_encodings_that_cannot_be_combined_are_refused():
    both = (("rope", "segment"), ("rope", "position"))
    message = refusal(tiny(position__relative=both))
    assert "position.relative" in message
    assert "rope_segment and rope_position" in message
    twice = (("alibi", "segment"), ("alibi", "segment", ("slope_scale", 2.0)))
    assert "position.relative" in refusal(tiny(position__relative=twice))
    plan.make(tiny(position__relative=(("rope", "segment"), ("alibi", "position"))))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"model__heads": 5}, ["model.heads=5", "model.width=32"]),
        ({"model__kv_heads": 3}, ["model.kv_heads=3", "model.heads=4"]),
        ({"model__kv_heads": 8}, ["model.kv_heads=8", "model.heads=4"]),
        ({"model__heads": 32, "model__kv_heads": 32}, ["model.width / model.heads = 1 is odd"]),
        ({"accumulation": 3}, ["accumulation=3", "batch_size=4"]),
        ({"loss_chunk": 6}, ["loss_chunk=6", "sequence_length=16"]),
        ({"schedule__warmup_steps": 5}, ["schedule.warmup_steps=5", "steps=4"]),
        (
            {"schedule__name": "wsd", "schedule__warmup_steps": 2, "schedule__decay_steps": 3},
            ["schedule.warmup_steps=2", "decay_steps=3", "steps=4"],
        ),
        ({"schedule__name": "wsd"}, ["schedule.decay_steps=0", "wsd"]),
        ({"schedule__decay_steps": 1}, ["schedule.decay_steps=1", "'linear'"]),
    ],
)
def test_fields_that_do_not_fit_together_are_both_named(change, parts):
    message = refusal(tiny(**change))
    for part in parts:
        assert part in message


def test_fields_at_the_edge_of_what_fits_are_accepted():
    plan.make(tiny(schedule__warmup_steps=4))
    plan.make(tiny(schedule__warmup_steps=0))
    plan.make(tiny(schedule__name="wsd", schedule__warmup_steps=1, schedule__decay_steps=3))
    plan.make(tiny(loss_chunk=100))  # longer than the block: one chunk
    plan.make(tiny(accumulation=4, model__kv_heads=1, data__max_bad_share=1))
    plan.make(tiny(optimizer__clip_norm=0.0, optimizer__weight_decay=0, optimizer__beta1=0.0))
    plan.make(tiny(position__absolute=[["learned", "offset", ["size", 3]]]))


def test_json_keeps_nested_tuples():
    config = configs.parse(tiny(position__relative=(("alibi", "segment", ("slope_scale", 96.0)),)))
    again = from_json(json.loads(json.dumps(to_json(config))))
    assert again == config
    assert again.position.relative == (("alibi", "segment", ("slope_scale", 96.0)),)
    assert again.data.sets == ()
    check_resumable(again, config, "runs/x")


def test_a_field_that_is_newer_than_a_saved_config_has_its_default():
    config = configs.parse(tiny(model__layers=3))
    saved = to_json(config)
    for name in FIELDS.keys() - {"model.layers"}:
        group, _, field = name.rpartition(".")
        del (saved[group] if group else saved)[field]
    assert from_json(saved) == configs.replace(
        configs.parse(configs.defaults()), {"model.layers": 3}
    )


def test_a_field_that_was_renamed_since_a_config_was_saved_is_renamed(monkeypatch):
    monkeypatch.setattr(configs, "FORMAT", 3)
    renames = {2: {"model.depth": "model.deep"}, 3: {"model.deep": "model.layers", "old": None}}
    monkeypatch.setattr(configs, "RENAMES", configs.RENAMES | renames)
    config = configs.parse(tiny(model__layers=3))
    saved = to_json(config) | {"format": 1, "old": 7}
    saved["model"]["depth"] = saved["model"].pop("layers")
    assert from_json(saved) == config
    saved["format"] = 2  # in which that was no field
    with pytest.raises(UserError, match=r"config\.model\.depth is unknown"):
        from_json(saved)


@pytest.mark.parametrize("number", [configs.FORMAT + 1, "1", None, True])
def test_a_config_of_a_later_format_is_refused(number):
    saved = to_json(configs.parse(tiny())) | {"format": number}
    if number is True:  # it is 1
        assert from_json(saved)
        return
    with pytest.raises(UserError, match=f"reads formats up to {configs.FORMAT}: use a newer one"):
        from_json(saved)


def test_the_reference_page_is_that_of_the_table():
    page = ROOT / "docs" / "reference" / "config.md"
    assert page.read_text(encoding="utf-8") == reference()


@pytest.mark.parametrize(
    ("text", "kind", "path", "sets"),
    [
        ("quickstart:train", "quickstart", "train", ()),
        ("tfds:lm1b:test", "tfds", "lm1b:test", ()),
        ("prepared:a/b#A|B c", "prepared", "a/b", ("A", "B c")),
        ("a/*.jsonl,b.jsonl.zst#A", "jsonl", "a/*.jsonl,b.jsonl.zst", ("A",)),
        ("gs://bucket/a.jsonl", "jsonl", "gs://bucket/a.jsonl", ()),
        ("a:b.jsonl", "jsonl", "a:b.jsonl", ()),
    ],
)
def test_a_source_is_parsed(text, kind, path, sets):
    source = spec.parse_source(text)
    assert source == spec.Source(text, kind, path, sets)


def test_a_mixture_is_parsed():
    mixture = spec.parse_mixture("a@b/*.jsonl@3; tfds:lm1b#X ;c.jsonl@2")
    assert [source.text for source in mixture.sources] == ["a@b/*.jsonl", "tfds:lm1b#X", "c.jsonl"]
    assert mixture.shares == pytest.approx((0.5, 1 / 6, 1 / 3))
    assert spec.parse_mixture("me@home/x.jsonl").sources[0].path == "me@home/x.jsonl"
    with pytest.raises(UserError, match="mixes prepared data with other sources"):
        spec.parse_mixture("prepared:x; y.jsonl")
    with pytest.raises(UserError, match="evaluation takes one source"):
        spec.parse_evaluation("a; b", "--data")


# What a run's arrays, or the order of its data, depend on; everything else may change on the way.
FIXED = {
    "batch_size": 8,
    "sequence_length": 32,
    "seed": 1,
    "model.layers": 3,
    "model.width": 64,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.feed_forward": 64,
    "model.vocab_size": 65,
    "model.tied_output": True,
    "model.norm_epsilon": 1e-6,
    "model.init_std": 0.1,
    "model.dtype": "bfloat16",
    "model.qk_norm": True,
    "model.logit_softcap": 30.0,
    "position.absolute": (),
    "position.relative": (("alibi", "segment"),),
    "position.draws": (("shift", "segment", ("maximum", 8)),),
    "segments.rule": "newline",
    "segments.levels": ("paragraph",),
    "optimizer.name": "lion",
    "data.sets": ("Plays",),
    "data.shuffle_blocks": 9,
    "data.packing": "document",
    "data.separate_documents": True,
    "data.cut_documents": "continue",
}
FREE = {
    "steps": 5,
    "initial_checkpoint": "runs/other",
    "accumulation": 2,
    "loss_chunk": 4,
    "z_loss": 1e-4,
    "model.attention": "chunked",
    "model.remat": "full",
    "model.dropout": 0.1,
    "tokenizer.path": "other.model",
    "tokenizer.train_bytes": 5,
    "data.train": "other.jsonl",  # if it has the same shards: tests/data/test_data_identity.py
    "data.evaluation": "other.jsonl",
    "data.workers": 2,
    "data.on_error": "skip",
    "data.on_change": "restart",
    "data.max_bad_share": 0.5,
    "optimizer.learning_rate": 1e-2,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.9,
    "optimizer.epsilon": 1e-6,
    "optimizer.weight_decay": 0.2,
    "optimizer.no_decay": (),
    "optimizer.clip_norm": 2.0,
    "schedule.name": "cosine",
    "spikes.threshold": 5.0,
    "log.wandb": "project",
    "spikes.policy": "skip",
    "mesh.devices": 8,
    "schedule.warmup_steps": 2,
    "schedule.decay_steps": 1,
    "schedule.final_fraction": 0.5,
    "checkpoint.every": 3,
    "checkpoint.keep": 1,
    "checkpoint.keep_every": 4,
    "checkpoint.keep_best": True,
    "log.every": 2,
    "log.peak_flops": 1e12,
    "mesh.data": 4,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
    "mesh.context": 2,
    "mesh.topology": "v5e:4x4",
    "evaluation.every": 3,
    "evaluation.lengths": (16,),
    "evaluation.context": 64,
    "evaluation.tokens": 64,
    "evaluation.batch_tokens": 32,
}


def test_every_field_is_either_fixed_or_free():
    assert set(FIXED) | set(FREE) == set(FIELDS)


@pytest.mark.parametrize(("name", "value"), FIXED.items())
def test_a_run_cannot_go_on_with_another(name, value):
    config = configs.parse(tiny())
    before = configs.value_of(config, name)
    with pytest.raises(UserError) as caught:
        check_resumable(config, configs.replace(config, {name: value}), "runs/x")
    for part in (f"config.{name}={value!r}", repr(before)):
        assert part in str(caught.value)


@pytest.mark.parametrize(("name", "value"), FREE.items())
def test_a_run_can_go_on_with_another(name, value):
    config = configs.parse(tiny())
    check_resumable(config, configs.replace(config, {name: value}), "runs/x")
