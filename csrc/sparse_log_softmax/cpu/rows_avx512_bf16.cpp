// x86-64 with AVX-512 F, BW, DQ, VL and BF16.
#define MEGATRON_PD_ISA avx512_bf16
#define MEGATRON_PD_VECTOR_BYTES 64
#include "rows_impl.h"
