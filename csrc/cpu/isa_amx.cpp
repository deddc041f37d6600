#define CONDENSE_ISA amx
#include "cpu/isa.h"
