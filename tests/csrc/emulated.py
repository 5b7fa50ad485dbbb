"""The CUDA kernels on the CPU, in the place of the compiled operators.

`EmulatedOperators` has the operators' names and takes the same tensors, so that all of
`sparse_log_softmax` and `row_divergence` can run on the kernels of csrc/*/cuda.
"""

import ctypes
import functools
import os
import subprocess
import tempfile
from ctypes import (
    CDLL,
    Structure,
    byref,
    c_bool,
    c_float,
    c_int,
    c_int64,
    c_uint,
    c_uint16,
    c_void_p,
)
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("emulated_kernels.cpp")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
LOGIT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class RowLayout(Structure):
    _fields_ = [("inner", c_int64), ("outer_stride", c_int64), ("inner_stride", c_int64)]

    @classmethod
    def of(cls, tensor_SBV: Tensor) -> "RowLayout":
        return cls(tensor_SBV.shape[1], tensor_SBV.stride(0), tensor_SBV.stride(1))


class Ids(Structure):
    _fields_ = [("data", c_void_p), ("is_64_bit", c_bool), ("count", c_int64)]


class Shard(Structure):
    _fields_ = [
        ("first_id", c_int64),
        ("size", c_int64),
        ("live", c_int64),
        ("vocab_size", c_int64),
    ]


class Temperatures(Structure):
    _fields_ = [("data", c_void_p), ("per_row", c_bool), ("count", c_int64)]


PROBLEM = [
    ("ids", Ids),
    ("shard", Shard),
    ("temperatures", Temperatures),
    ("parts", c_int64),
]


class ForwardArguments(Structure):
    _fields_ = [
        ("logits", c_void_p),
        ("layout", RowLayout),
        *PROBLEM,
        ("partial", c_void_p),
        ("max", c_void_p),
        ("sums", c_void_p),
    ]


class BackwardArguments(Structure):
    _fields_ = [
        ("logits", c_void_p),
        ("layout", RowLayout),
        ("gradient", c_void_p),
        ("gradient_layout", RowLayout),
        *PROBLEM,
        ("max", c_void_p),
        ("sums", c_void_p),
        ("grad_logq", c_void_p),
        ("grad_lse", c_void_p),
    ]


def _problem(
    logits_SBV: Tensor, ids_TK: Tensor, temperatures_TN: Tensor, first_id: int, vocab_size: int
) -> tuple[Ids, Shard, Temperatures]:
    size = logits_SBV.shape[-1]
    live = max(0, min(size, vocab_size - first_id))
    return (
        Ids(ids_TK.data_ptr(), ids_TK.dtype == torch.int64, ids_TK.shape[1]),
        Shard(first_id, size, live, vocab_size),
        Temperatures(
            temperatures_TN.data_ptr(), len(temperatures_TN) > 1, temperatures_TN.shape[1]
        ),
    )


class Divergence(Structure):
    _fields_ = [("tail", c_int), ("loss", c_int), ("weight", c_int), ("beta", c_float)]

    TAILS = ("renormalize", "raw", "ghost", "to-label", "decoupled", "sampled")
    LOSSES = ("nll", "kld", "reverse-kld", "jsd", "mse-prob")
    WEIGHTS = ("one", "tau-squared", "tempered-mass")

    @classmethod
    def named(cls, tail: str, loss: str, weight: str, beta: float) -> "Divergence":
        indices = cls.TAILS.index(tail), cls.LOSSES.index(loss), cls.WEIGHTS.index(weight)
        return cls(*indices, beta)


class RowProblem(Structure):
    _fields_ = [
        ("log_q", c_void_p),
        ("log_q_stride", c_int64),
        ("label_log_q", c_void_p),
        ("ids", c_void_p),
        ("log_t", c_void_p),
        ("counts", c_void_p),
        ("labels", c_void_p),
        ("temperatures", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("loss", c_void_p),
        ("grad_log_q", c_void_p),
        ("grad_label_log_q", c_void_p),
    ]


class EmulatedOperators:
    """`parts` is the number of blocks per row; `reversed` runs blocks and their threads in the
    opposite order; `gradient_offset` puts an out-of-place gradient that many elements after a
    16-byte boundary."""

    def __init__(self, *, parts: int = 1, reversed: bool = False, gradient_offset: int = 0) -> None:
        self.library = emulator_library()
        self.parts = parts
        self.reversed = reversed
        self.gradient_offset = gradient_offset

    def sparse_log_softmax_forward(
        self,
        logits_SBV: Tensor,
        ids_TK: Tensor,
        temperatures_TN: Tensor,
        first_id: int,
        vocab_size: int,
    ) -> tuple[Tensor, Tensor]:
        rows, count = ids_TK.shape
        each = temperatures_TN.shape[1]
        max_T, sums_T = torch.empty(rows), torch.empty(rows, each + count)
        partial = torch.empty(rows, self.parts, 1 + each)
        arguments = ForwardArguments(
            logits_SBV.data_ptr(),
            RowLayout.of(logits_SBV),
            *_problem(logits_SBV, ids_TK, temperatures_TN, first_id, vocab_size),
            self.parts,
            partial.data_ptr(),
            max_T.data_ptr(),
            sums_T.data_ptr(),
        )
        self.library.emulate_forward(
            LOGIT_TYPES[logits_SBV.dtype], byref(arguments), c_uint(rows), self.reversed
        )
        return max_T, sums_T

    def row_divergence(
        self, log_q_TK: Tensor, label_log_q_T: Tensor, *others: Tensor | str | float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = log_q_TK.shape
        inputs, names = others[:5], others[5:]
        outputs = torch.empty(rows), torch.empty(rows, columns), torch.empty(rows)
        problem = RowProblem(
            log_q_TK.data_ptr(),
            log_q_TK.stride(0),
            *(tensor.data_ptr() for tensor in (label_log_q_T, *inputs)),
            rows,
            columns,
            *(tensor.data_ptr() for tensor in outputs),
        )
        self.library.emulate_row_divergence(
            byref(Divergence.named(*names)), byref(problem), self.reversed
        )
        return outputs

    def sparse_log_softmax_backward(self, logits_SBV: Tensor, *others: Tensor | int) -> Tensor:
        storage = logits_SBV.new_empty(self.gradient_offset + logits_SBV.numel())
        grad_SBV = storage[self.gradient_offset :].view(logits_SBV.shape)
        self._backward(logits_SBV, grad_SBV, *others)
        return grad_SBV

    def sparse_log_softmax_backward_(self, logits_SBV: Tensor, *others: Tensor | int) -> None:
        self._backward(logits_SBV, logits_SBV, *others)

    def _backward(
        self,
        logits_SBV: Tensor,
        grad_SBV: Tensor,
        ids_TK: Tensor,
        temperatures_TN: Tensor,
        max_T: Tensor,
        sums_T: Tensor,
        grad_logq_TK: Tensor,
        grad_lse_T: Tensor,
        first_id: int,
        vocab_size: int,
    ) -> None:
        arguments = BackwardArguments(
            logits_SBV.data_ptr(),
            RowLayout.of(logits_SBV),
            grad_SBV.data_ptr(),
            RowLayout.of(grad_SBV),
            *_problem(logits_SBV, ids_TK, temperatures_TN, first_id, vocab_size),
            self.parts,
            *(x.data_ptr() for x in (max_T, sums_T, grad_logq_TK, grad_lse_T)),
        )
        self.library.emulate_backward(
            LOGIT_TYPES[logits_SBV.dtype], byref(arguments), c_uint(len(ids_TK)), self.reversed
        )


def compile_kernels(target: Path, *flags: str) -> None:
    """The kernels and the emulator as a shared library."""
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-g", "-fPIC", "-shared"]
    command += ["-fno-strict-aliasing", "-Wall", "-Werror", "-Wno-unknown-pragmas", *flags]
    subprocess.run([*command, str(SOURCE), "-o", str(target)], check=True)


@functools.cache
def emulator_library() -> CDLL:
    """The kernels compiled for the host, or the library that MEGATRON_PD_EMULATOR names."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(os.environ.get("MEGATRON_PD_EMULATOR", f"{folder}/emulated_kernels.so"))
        if not target.exists():
            compile_kernels(target)
        library = ctypes.CDLL(str(target))
    library.emulate_narrow.argtypes = [ctypes.c_int, c_float]
    library.emulate_narrow.restype = c_uint16
    library.emulate_widen.argtypes = [ctypes.c_int, c_uint16]
    library.emulate_widen.restype = c_float
    library.emulate_race.argtypes = [c_bool]
    library.emulate_race.restype = c_float
    return library
