// The products of bfloat16 on processors that have its dot product. All else is in kernels_avx512.cpp.
#define RF_ISA avx512_bf16
#define RF_DOT 1
#include "kernels.inc"
