#define CONDENSE_ISA avx2
#include "cpu/isa.h"
