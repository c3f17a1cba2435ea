#define RF_ISA avx512
#include "kernels.inc"
