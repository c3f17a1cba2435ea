// One library of all calls that tests of batch norm make.
#include "elementwise_kernels.cpp"
#include "launch_plans.cpp"
#include "sums_kernels.cpp"
