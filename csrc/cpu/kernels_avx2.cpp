#define RF_ISA avx2
#include "kernels.inc"
