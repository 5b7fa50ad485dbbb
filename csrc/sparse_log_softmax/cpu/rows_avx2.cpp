// x86-64 with AVX2 and FMA.
#define MEGATRON_PD_ISA avx2
#define MEGATRON_PD_VECTOR_BYTES 32
#include "rows_impl.h"
