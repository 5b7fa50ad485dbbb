"""config.json ⇄ Megatron's arguments, by the tables of `architectures`.

A `ModelConfig` stands between: the values of one model, checked, whichever side they come from.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from megatron_pd.errors import UserError
from megatron_pd.hf.architectures import (
    ARCHITECTURES,
    COMMON_ARGUMENTS,
    HARMLESS,
    OUTPUT,
    ROPE_TYPES,
    UNSUPPORTED,
    Architecture,
    Field,
    TensorRow,
)

__all__ = ["ModelConfig", "config_of_arguments", "is_usable", "read_config"]

_VOCABULARY_MULTIPLE = 128
"""Megatron's own default of --make-vocab-size-divisible-by: any TP size up to 128 divides it."""
_SEQUENCE_LENGTH = 4096
_ROPE_FIELDS = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LARGEST = 1 << 31
_LARGEST_NUMBER = 1e30


@dataclass(frozen=True)
class ModelConfig:
    """A model that both sides can express."""

    architecture: Architecture
    values: Mapping[str, Any]
    """Of the architecture's fields, all of them, by their names in config.json."""
    rope: Mapping[str, Any]
    """`rope_parameters` as transformers 5 has them, with defaults filled in."""

    @property
    def tied(self) -> bool:
        return self.values["tie_word_embeddings"]

    @property
    def layers(self) -> int:
        return self.values["num_hidden_layers"]

    @property
    def tensors(self) -> tuple[TensorRow, ...]:
        return tuple(row for row in self.architecture.tensors if not (self.tied and row is OUTPUT))

    def groups_of(self, row: TensorRow) -> int:
        """In how many groups a row's parts are joined."""
        return self.values["num_key_value_heads"] if row.grouped else 1

    def layers_of(self, row: TensorRow) -> range:
        """One layer where a row's tensor is there once."""
        return range(self.layers if row.per_layer else 1)

    def shapes_of(self, row: TensorRow) -> list[tuple[int, ...]]:
        """Of a row's parts."""
        return [self._shape(axes) for _, axes in row.parts]

    def joined_shape_of(self, row: TensorRow) -> tuple[int, ...]:
        """Of the tensor that a row's parts become, in one layer and without padding."""
        first, *others = self.shapes_of(row)
        return (first[0] + sum(shape[0] for shape in others), *first[1:])

    def _shape(self, axes: str) -> tuple[int, ...]:
        values = self.values
        size = {
            "V": values["vocab_size"],
            "H": values["hidden_size"],
            "F": values["intermediate_size"],
            "U": 2 * values["intermediate_size"],
            "Q": values["num_attention_heads"] * values["head_dim"],
            "K": values["num_key_value_heads"] * values["head_dim"],
            "D": values["head_dim"],
        }
        return tuple(size[axis] for axis in axes)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embeddings in Megatron."""
        return -(-self.values["vocab_size"] // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE

    def arguments(self) -> dict[str, Any]:
        """What of Megatron's arguments makes this model."""
        groups, base = self.values["num_key_value_heads"], self.rope["rope_theta"]
        scaling = ROPE_TYPES[self.rope["rope_type"]]
        return {
            **COMMON_ARGUMENTS,
            **{
                row.megatron: not self.values[row.hf] if row.opposite else self.values[row.hf]
                for row in self.architecture.fields
            },
            **self.architecture.arguments,
            **scaling.arguments,
            **{argument: self.rope[name] for name, argument in scaling.parameters.items()},
            # Older switches of position_embedding_type, which the latter would set again.
            "add_position_embedding": True,
            "use_rotary_position_embeddings": False,
            "rotary_base": int(base) if base == int(base) else base,
            "rotary_percent": self.rope["partial_rotary_factor"],
            "group_query_attention": groups != self.values["num_attention_heads"],
            "hidden_dropout": 0.0,
            "make_vocab_size_divisible_by": _VOCABULARY_MULTIPLE,
            "padded_vocab_size": self.padded_vocab_size,
            "seq_length": min(self.values["max_position_embeddings"], _SEQUENCE_LENGTH),
        }

    def json(self, dtype: str, source: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of this model.

        Args:
            dtype: as "bfloat16".
            source: a config.json whose other fields are kept where it is of this architecture;
                else its token ids are.
        """
        architecture = self.architecture
        if source.get("model_type") != architecture.model_type:
            source = {name: source[name] for name in _TOKEN_IDS if name in source}
        raw: dict[str, Any] = {
            **source,
            "architectures": [architecture.class_name],
            "model_type": architecture.model_type,
            "dtype" if "dtype" in source else "torch_dtype": dtype,
        }
        fresh = "model_type" not in source
        for row in architecture.fields:
            given = source.get(row.hf)
            if given is None and row.absent is not ...:
                given = _absent(row, self.values)
            if fresh or given != self.values[row.hf]:
                raw[row.hf] = self.values[row.hf]
        for refusal in architecture.refusals if fresh else ():
            if refusal.absent is not None:
                raw[refusal.field] = refusal.absent
        raw.pop("quantization_config", None)  # of a file that the weights came from
        if raw.get("layer_types") is not None:
            raw["layer_types"] = ["full_attention"] * self.layers
        if fresh or _rope(source, architecture) != self.rope:
            raw = {name: value for name, value in raw.items() if name not in _ROPE_FIELDS}
            raw |= self._rope_json()
        return raw

    def _rope_json(self) -> dict[str, Any]:
        """As transformers 4 writes it, which 5 reads too."""
        rope = dict(self.rope)
        raw = {"rope_theta": rope.pop("rope_theta")}
        if (partial := rope.pop("partial_rotary_factor")) != 1:
            raw["partial_rotary_factor"] = partial
        raw["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
        return raw


# ------------------------------------------------------------------------ from config.json


def read_config(raw: Mapping[str, Any], name: str) -> ModelConfig:
    """The model of a config.json.

    Args:
        name: of the file.
    Raises:
        UserError: a field that Megatron can't express, that is unknown or no sensible value.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        reason = UNSUPPORTED.get(str(model_type), "there is no table for it")
        raise UserError(
            f"{name}: model_type {model_type!r} is not supported ({reason}); supported are "
            f"{', '.join(ARCHITECTURES)}."
        )
    architecture = ARCHITECTURES[model_type]
    for refusal in architecture.refusals:
        if not isinstance(raw.get("max_position_embeddings"), int):
            break  # said below
        value = raw.get(refusal.field, refusal.absent)
        try:
            allowed = refusal.allowed(value, raw)
        except (TypeError, AttributeError):  # a value of another kind than transformers writes
            allowed = False
        if not allowed:
            given = "" if refusal.field in raw else " (transformers' default)"
            raise UserError(
                f"{name}: {refusal.field} is {_shown(value)}{given}, which is not supported: "
                f"{refusal.reason}."
            )
    known = {row.hf for row in architecture.fields} | HARMLESS
    known |= {refusal.field for refusal in architecture.refusals}
    for unknown in (key for key in raw if key not in known and not key.startswith("_")):
        raise UserError(
            f"{name}: {unknown} is {_shown(raw[unknown])}, a field that is not known here: if it "
            "does not change what the model computes, remove it from a copy of the file."
        )
    values: dict[str, Any] = {}
    for row in architecture.fields:
        if row.hf in raw and raw[row.hf] is not None:
            values[row.hf] = raw[row.hf]
        elif row.absent is ...:
            raise UserError(f"{name} has no {row.hf}: it is needed to know the model's shape.")
        else:
            values[row.hf] = _absent(row, values)
    return _checked(ModelConfig(architecture, values, _rope(raw, architecture)), name)


def is_usable(raw: Mapping[str, Any]) -> bool:
    """Whether `read_config` takes it."""
    try:
        read_config(raw, "")
    except UserError:
        return False
    return True


def _rope(raw: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """`rope_parameters` with the defaults, from what transformers 4 or 5 wrote."""
    top = {
        key: raw[key] for key in ("rope_theta", "partial_rotary_factor") if raw.get(key) is not None
    }
    rope = {"rope_type": "default", **architecture.rope_defaults, **top}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(found := raw.get(key), Mapping):
            rope |= found
        elif found is not None:
            rope[key] = found  # refused as unknown
    if "type" in rope:  # its name before rope_type
        rope["rope_type"] = rope.pop("type")
    row = ROPE_TYPES.get(str(rope["rope_type"]))
    return {**(row.absent if row else {}), **rope}


# ------------------------------------------------------------------ from Megatron's arguments


def config_of_arguments(
    args: Any, vocab_size: int, source: Mapping[str, Any], name: str
) -> ModelConfig:
    """The model of a checkpoint's arguments.

    Args:
        vocab_size: without padding.
        source: as `ModelConfig.json` takes it; its architecture is preferred where several are the
            same to Megatron.
        name: of the checkpoint.
    Raises:
        UserError: an argument that no architecture has.
    """
    for key, expected in COMMON_ARGUMENTS.items():
        found = getattr(args, key, expected)
        if found != expected:
            raise UserError(
                f"{name}: the model has {key} = {_shown(found)}, and Hugging Face's architectures "
                f"that are known here have {_shown(expected)}."
            )
    architecture = _architecture_of(args, source, name)
    heads = args.num_attention_heads
    grouped = getattr(args, "group_query_attention", False)
    own = {
        "vocab_size": vocab_size,
        "num_key_value_heads": args.num_query_groups if grouped else heads,
        "head_dim": getattr(args, "kv_channels", None) or args.hidden_size // heads,
    }
    values = {
        row.hf: own[row.hf]
        if row.hf in own
        else (not getattr(args, row.megatron))
        if row.opposite
        else getattr(args, row.megatron)
        for row in architecture.fields
    }
    return _checked(ModelConfig(architecture, values, _rope_of(args, name)), name)


def _architecture_of(args: Any, source: Mapping[str, Any], name: str) -> Architecture:
    candidates = [
        architecture
        for architecture in ARCHITECTURES.values()
        if all(getattr(args, key, None) == value for key, value in architecture.arguments.items())
    ]
    for architecture in candidates:
        if architecture.model_type == source.get("model_type"):
            return architecture
    if candidates:
        return candidates[0]
    keys = sorted({key for each in ARCHITECTURES.values() for key in each.arguments})
    found = ", ".join(f"{key} = {_shown(getattr(args, key, None))}" for key in keys)
    raise UserError(
        f"{name}: no Hugging Face architecture that is known here has {found} together."
    )


def _rope_of(args: Any, name: str) -> dict[str, Any]:
    for rope_type, row in ROPE_TYPES.items():
        found = {
            parameter: getattr(args, argument, None)
            for parameter, argument in row.parameters.items()
        }
        found |= {key: value for key, value in row.absent.items() if found[key] is None}
        matches = all(getattr(args, key, value) == value for key, value in row.arguments.items())
        if matches and None not in found.values():
            return {
                "rope_type": rope_type,
                "rope_theta": float(args.rotary_base),
                "partial_rotary_factor": args.rotary_percent,
                **row.fixed,
                **found,
            }
    keys = ("position_embedding_type", "use_rope_scaling", "rotary_seq_len_interpolation_factor")
    shown = ", ".join(f"{key} = {_shown(getattr(args, key, None))}" for key in keys)
    raise UserError(
        f"{name}: no Hugging Face architecture that is known here has {shown} together."
    )


# -------------------------------------------------------------------------------- both sides


def _checked(config: ModelConfig, name: str) -> ModelConfig:
    for row in config.architecture.fields:
        _check_kind(row, config.values[row.hf], name)
    values = config.values
    if values["num_attention_heads"] % values["num_key_value_heads"]:
        raise UserError(
            f"{name}: num_attention_heads {values['num_attention_heads']} is no multiple of "
            f"num_key_value_heads {values['num_key_value_heads']}."
        )
    for complaint in _rope_complaints(config):
        raise UserError(f"{name}: {complaint}.")
    return config


def _check_kind(row: Field, value: Any, name: str) -> None:
    fits = {
        int: type(value) is int and 0 < value < _LARGEST,
        float: _is_number(value) and value >= 0,
        bool: type(value) is bool,
    }
    if not fits[row.kind]:
        expected = {int: "a whole number from 1 on", float: "a number from 0 on", bool: "a boolean"}
        raise UserError(f"{name}: {row.hf} is {_shown(value)}, expected {expected[row.kind]}.")


def _rope_complaints(config: ModelConfig) -> Iterator[str]:
    rope, architecture = config.rope, config.architecture
    rope_type = rope["rope_type"]
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        yield (
            f"rope_type is {_shown(rope_type)}, which Megatron 0.19.2 does not have or has "
            f"otherwise; supported are {', '.join(ROPE_TYPES)}"
        )
        return
    row = ROPE_TYPES[rope_type]
    own = {"rope_theta", "partial_rotary_factor", *row.parameters}
    for key in sorted(own):
        value = rope.get(key)
        if key == "truncate" and type(value) is not bool:
            yield f"{key} of RoPE is {_shown(value)}, expected a boolean"
            return
        if key != "truncate" and not (_is_number(value) and value > 0):
            yield f"{key} of RoPE is {_shown(value)}, expected a number above 0"
            return
    for key, expected in row.fixed.items():
        if rope.get(key) != expected:
            yield (
                f"{key} of RoPE is {_shown(rope.get(key))}, and Megatron 0.19.2 has it fixed at "
                f"{expected}"
            )
    for key in rope.keys() - own - row.fixed.keys() - {"rope_type"}:
        yield f"{key} of RoPE is {_shown(rope[key])}, which is not known here"
    if architecture.arguments["rotary_interleaved"] and not row.interleaved:
        yield f"rope_type is {rope_type!r}, and Megatron 0.19.2 lacks it for interleaved RoPE"
    partial = rope["partial_rotary_factor"]
    if partial > 1 or architecture.arguments.get("rotary_percent", partial) != partial:
        yield (
            f"partial_rotary_factor is {_shown(partial)}, and "
            f"{architecture.class_name} in transformers has 1"
        )


def _absent(row: Field, values: Mapping[str, Any]) -> Any:
    if not callable(row.absent):
        return row.absent
    try:
        return row.absent(values)
    except (TypeError, ZeroDivisionError):  # the sizes are nonsense, which is said later
        return None


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and abs(value) < _LARGEST_NUMBER


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
