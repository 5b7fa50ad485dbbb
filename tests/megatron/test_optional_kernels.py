"""Megatron's defaults fit what is installed beside a GPU; what is given is never changed."""

import argparse
import importlib.util

import pytest

from megatron_pd.errors import UserError
from megatron_pd.megatron import cpu
from megatron_pd.megatron.optional_kernels import check_gpu_args, set_gpu_defaults

TRANSFORMER_ENGINE = "transformer_engine"
APEX = {"fused_weight_gradient_mlp_cuda", "scaled_upper_triang_masked_softmax_cuda"}


def parse(monkeypatch, installed: set[str], *argv: str) -> argparse.Namespace:
    """Some of Megatron's flags with its defaults, on a GPU machine with these modules."""
    monkeypatch.setattr(cpu, "is_cpu", lambda: False)
    found = lambda name: object() if name in installed else None
    monkeypatch.setattr(importlib.util, "find_spec", found)
    parser = argparse.ArgumentParser()
    parser.add_argument("--transformer-impl", default="transformer_engine")
    parser.add_argument("--no-rope-fusion", dest="apply_rope_fusion", action="store_false")
    parser.add_argument("--no-persist-layer-norm", action="store_true")
    for name in ("gradient_accumulation_fusion", "masked_softmax_fusion"):
        flag = f"--no-{name.replace('_', '-')}"
        parser.add_argument(flag, dest=name, action="store_false")
    parser.add_argument("--context-parallel-size", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--normalization", default="LayerNorm")
    set_gpu_defaults(parser)
    return parser.parse_args(argv)


def test_nothing_changes_where_all_is_installed(monkeypatch):
    args = parse(monkeypatch, {TRANSFORMER_ENGINE, *APEX})
    assert args.transformer_impl == "transformer_engine" and args.apply_rope_fusion
    assert args.gradient_accumulation_fusion and args.masked_softmax_fusion


def test_transformer_engine_alone(monkeypatch):
    args = parse(monkeypatch, {TRANSFORMER_ENGINE}, "--sequence-parallel")
    assert args.transformer_impl == "transformer_engine" and args.apply_rope_fusion
    assert not args.gradient_accumulation_fusion and not args.masked_softmax_fusion
    check_gpu_args(args)


def test_neither(monkeypatch):
    args = parse(monkeypatch, set())
    assert args.transformer_impl == "local" and args.no_persist_layer_norm
    assert not args.apply_rope_fusion and not args.gradient_accumulation_fusion
    check_gpu_args(args)
    given = parse(monkeypatch, set(), "--transformer-impl", "transformer_engine")
    assert given.transformer_impl == "transformer_engine"


@pytest.mark.parametrize(
    "flags",
    [
        ["--context-parallel-size", "2"],
        ["--sequence-parallel", "--normalization", "RMSNorm"],
    ],
)
def test_what_local_layers_cannot_do_is_refused(monkeypatch, flags):
    with pytest.raises(UserError, match=flags[0] + ".*Transformer Engine"):
        check_gpu_args(parse(monkeypatch, set(), *flags))
