#define CONDENSE_ISA avx512_bf16
#include "cpu/isa.h"
