// All kernels in one translation unit: one image for each kind of GPU.
#include "attention.cu"
#include "experts.cu"
#include "low_rank.cu"
#include "product.cu"
#include "rows.cu"
#include "sampling.cu"
