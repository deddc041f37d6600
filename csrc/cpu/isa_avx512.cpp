#define CONDENSE_ISA avx512
#include "cpu/isa.h"
