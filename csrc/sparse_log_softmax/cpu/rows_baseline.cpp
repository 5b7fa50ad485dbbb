// Any CPU: SSE2 on x86-64, NEON on AArch64.
#define MEGATRON_PD_ISA baseline
#define MEGATRON_PD_VECTOR_BYTES 16
#include "rows_impl.h"
