#define RF_ISA baseline
#include "kernels.inc"
