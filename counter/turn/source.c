/* The name of what was compiled, so that library.py uses no library of other sources. */

#include "source.h"

/* setup.py gives it. What is compiled by hand, without it, is no library that would be used. */
#ifndef TURN_SOURCE
#define TURN_SOURCE "compiled by hand"
#endif

const char *turn_source(void) {
    return TURN_SOURCE;
}
