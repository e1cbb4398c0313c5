"""A checkpoint of ours -> a directory that Hugging Face's transformers loads.

A model whose only encoding is rope of position becomes a plain Llama. Any other includes
`modeling_bipe.py` and what that imports, for `trust_remote_code=True`. `tokenization_bipe.py` wraps
SentencePiece.
`config.json` contains our config under the key "bipe_jax", from which `from_hf` restores it.
"""

import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable

import sentencepiece
from safetensors.numpy import save_file

from bipe_jax import checkpoint, segments
from bipe_jax.convert import mapping
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import UserError
from bipe_jax.plan import Plan
from bipe_jax.positions.registry import Entry
from bipe_jax.workdir import outputs

_LOG = logging.getLogger(__name__)

SHARD_BYTES = 5_000_000_000
_HERE = os.path.dirname(__file__)
_MODEL_CODE = ("modeling_bipe.py", "positions_bipe.py", "segments_bipe.py")

# Kind of encoding in modeling_bipe.py -> its options and their defaults, which depend on the config.
_OPTIONS: dict[str, Callable] = {
    "learned": lambda config: {"size": config.sequence_length},
    "sinusoidal": lambda config: {"theta": 10000.0, "scale": config.model.init_std},
    "rope": lambda config: {"theta": 10000.0, "scaling": "", "factor": None, "original": None},
    "alibi": lambda config: {"slope_scale": 1.0},
}
_SCALINGS = ("", "linear", "ntk", "dynamic-ntk", "yarn")


def convert(path: str, destination: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes config, parameters in float32, tokenizer and code to a new directory.

    Args:
      path: a checkpoint, see `checkpoint.load`.
      destination: a local directory that does not exist, or is empty.
      shard_bytes: the largest size of a file of parameters.

    Raises:
      UserError: the checkpoint cannot be converted or written. `destination` is unchanged.
    """
    _check_free(destination)
    meta, params = checkpoint.load(path)
    config, tokenizer = meta.config, meta.tokenizer
    llama = is_llama(config)
    files = {
        "config.json": config_of(config, tokenizer),
        "generation_config.json": _generation_config(config, tokenizer),
        "tokenizer_config.json": _tokenizer_config(tokenizer),
    }
    unfinished = f"{os.path.abspath(destination)}.unfinished"
    try:
        os.makedirs(unfinished)
        for name, content in files.items():
            with open(os.path.join(unfinished, name), "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2, ensure_ascii=False)
        with open(os.path.join(unfinished, "tokenizer.model"), "wb") as file:
            file.write(tokenizer.model)
        for code in ("tokenization_bipe.py", *(() if llama else _MODEL_CODE)):
            shutil.copyfile(os.path.join(_HERE, code), os.path.join(unfinished, code))
        _write_tensors(unfinished, config, params, shard_bytes)
        os.rename(unfinished, destination)
    except FileExistsError:
        raise UserError(
            f"{unfinished} is there already, from a conversion that is in progress or was killed: "
            "remove it"
        ) from None
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not isinstance(error, Exception) or isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"writing {destination} failed ({reason})") from error
    _LOG.info(f"Wrote {destination} ({'LlamaForCausalLM' if llama else 'trust_remote_code=True'})")


def _check_free(destination: str) -> None:
    if "://" in destination:
        raise UserError(f"{destination}: transformers reads local directories: name one")
    if os.path.isfile(destination) or (os.path.isdir(destination) and os.listdir(destination)):
        raise UserError(f"{destination} is there already, and not empty: name another directory")
    outputs.check_new(destination)


def is_llama(config: Plan) -> bool:
    """Whether a model is a plain Llama: its only encoding is rope of position, not scaled."""
    relative = config.encodings.relative
    return (
        not (config.model.qk_norm or config.model.logit_softcap)
        and not config.encodings.absolute
        and [entry.name for entry in relative] == ["rope_position"]
        and not _exported(config, relative[0])["scaling"]
    )


def _exported(config: Plan, entry: Entry) -> dict:
    """An entry of modeling_bipe.py's config, with all options. Raises UserError if it lacks them."""
    if len(entry.layers) < config.model.layers:
        raise UserError(
            f"the encoding {entry.name!r} of some layers only cannot be converted: modeling_bipe.py has the "
            "same encodings in all layers"
        )
    if entry.kind not in _OPTIONS:
        raise UserError(
            f"the encoding {entry.kind!r} of {entry.coordinate!r} cannot be converted: "
            f"modeling_bipe.py computes {', '.join(_OPTIONS)}"
        )
    options = _OPTIONS[entry.kind](config)
    if unknown := entry.options.keys() - options.keys():
        raise UserError(
            f"the option {min(unknown)!r} of {entry.kind!r} cannot be converted: modeling_bipe.py "
            f"knows {', '.join(options)}"
        )
    options |= entry.options
    if (scaling := options.get("scaling", "")) not in _SCALINGS:
        raise UserError(
            f"the rope scaling {scaling!r} cannot be converted: modeling_bipe.py computes "
            f"{', '.join(_SCALINGS[1:])}"
        )
    return {"kind": entry.kind, "coordinate": entry.coordinate, **options}


def encodings_of(config: Plan) -> dict:
    """The encodings of modeling_bipe.py's config. Raises UserError for those that it lacks."""
    return {
        "absolute_encodings": [_exported(config, e) for e in config.encodings.absolute],
        "relative_encodings": [_exported(config, e) for e in config.encodings.relative],
    }


def config_of(config: Plan, tokenizer: Tokenizer) -> dict:
    """The contents of config.json: Llama's names, the encodings, and our config.

    Raises:
      UserError: modeling_bipe.py lacks an encoding.
    """
    m, ids = config.model, _ids(tokenizer)
    common = {
        "vocab_size": m.vocab_size,
        "hidden_size": m.width,
        "intermediate_size": m.feed_forward,
        "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.kv_heads,
        "rms_norm_eps": m.norm_epsilon,
        "initializer_range": m.init_std,
        "max_position_embeddings": config.sequence_length,
        "tie_word_embeddings": m.tied_output,
        "dtype": "float32",
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
        "bipe_jax": checkpoint.meta_to_json(config),
    }
    if is_llama(config):
        (rope,) = (_exported(config, entry) for entry in config.encodings.relative)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": rope["theta"]},
            "rope_theta": rope["theta"],  # for transformers before 5
            **common,
        }
    if reading := next((name for name in segments.segmenters_of(config) if name), ""):
        raise UserError(
            f"the segment rule {reading!r} reads the text and cannot be converted: modeling_bipe.py sees "
            "tokens alone"
        )
    return {
        "architectures": ["BipeForCausalLM"],
        "model_type": "bipe_jax",
        "auto_map": {
            "AutoConfig": "modeling_bipe.BipeConfig",
            "AutoModelForCausalLM": "modeling_bipe.BipeForCausalLM",
        },
        **encodings_of(config),
        "segment_rule": segments.to_json(config.segment_rule),
        "qk_norm": m.qk_norm,
        "final_logit_softcapping": m.logit_softcap or None,
        **common,
    }


def _ids(tokenizer: Tokenizer) -> dict:
    """The ids of BOS (what documents begin with), EOS and UNK, None where there is none, and of padding."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    ids = {name: getattr(processor, f"{name}_id")() for name in ("eos", "pad", "unk")}
    ids = {"bos": tokenizer.bos_id, **ids}
    ids = {name: i if i >= 0 else None for name, i in ids.items()}
    # Padding is masked, so that its id does not matter.
    ids["pad"] = next(i for i in (ids["pad"], ids["eos"], ids["unk"]) if i is not None)
    return ids


def _generation_config(config: Plan, tokenizer: Tokenizer) -> dict:
    ids = _ids(tokenizer)
    dynamic = any(
        entry.options.get("scaling") == "dynamic-ntk" for entry in config.encodings.relative
    )
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": sorted(tokenizer.ends) or None,
        "pad_token_id": ids["pad"],
        "use_cache": not dynamic,  # dynamic NTK changes the keys with the length
    }


def _tokenizer_config(tokenizer: Tokenizer) -> dict:
    """The contents of tokenizer_config.json.

    Without trust_remote_code, transformers (since 5.0) use their class for SentencePiece. Its ids are the
    same; its decoding is not exact.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    ids = _ids(tokenizer)
    tokens = {f"{name}_token": processor.id_to_piece(i) for name, i in ids.items() if i is not None}
    return {
        "tokenizer_class": "SentencePieceBackend",
        "auto_map": {"AutoTokenizer": ["tokenization_bipe.BipeTokenizer", None]},
        **tokens,
        "special_tokens_pattern": "none" if ids["bos"] is None else "bos",
        "split_special_tokens": True,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }


def _write_tensors(directory: str, config, params: dict, shard_bytes: int) -> None:
    """Writes model.safetensors, or model-I-of-N.safetensors and their index."""
    shards, size = [[]], 0  # names
    for pair in mapping.pairs(config):
        nbytes = 4 * math.prod(pair.shape)
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(pair.theirs)
        size += nbytes
    count = len(shards)
    files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        files = ["model.safetensors"]
    tensors, total = mapping.to_llama(config, params), 0
    for names, file in zip(shards, files, strict=True):
        part = dict(itertools.islice(tensors, len(names)))
        path = os.path.join(directory, file)
        save_file(part, path, metadata={"format": "pt"})
        shutil.copymode(os.path.join(directory, "config.json"), path)  # it was 0600
        total += sum(tensor.nbytes for tensor in part.values())
    if count > 1:
        weight_map = {
            name: file for names, file in zip(shards, files, strict=True) for name in names
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        with open(os.path.join(directory, "model.safetensors.index.json"), "w") as file:
            json.dump(index, file, indent=2)
