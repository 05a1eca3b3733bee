// Every kernel of one instruction set, in the order in which they build on each other.
#include "vectors_rows.h"
#include "normals_rows.h"
#include "branch_step_rows.h"
#include "branch_step_backward_rows.h"
#include "group_mean_rows.h"

#undef SAGE_BYTES
#undef SAGE_LANES
#undef SAGE_VECTOR
#undef SAGE_MULTIPLY_EVEN
