// CUPTI, by which torch's profiler would record a GPU: it says that there is nothing to record.
//
// The real one reads the real driver's private tables.
#include "runtime/null.h"

M3I_EXPORT int cuptiGetResultString(int, const char** text) {
  *text = "the null CUDA runtime records nothing for CUPTI";
  return 0;
}
