#define CONDENSE_ISA baseline
#include "cpu/isa.h"
