// NVTX ranges for Python. Without a tool that records them, NVTX's header calls nothing.
#include "m3i/host/python_module.h"

#include <nvtx3/nvToolsExt.h>

namespace {

PyObject* push(PyObject*, PyObject* name) {
  const char* text = PyUnicode_AsUTF8AndSize(name, nullptr);
  if (text == nullptr) {
    return nullptr;
  }
  nvtxRangePushA(text);
  Py_RETURN_NONE;
}

PyObject* pop(PyObject*, PyObject*) {
  nvtxRangePop();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"push", push, METH_O, "Open a range of this name on the calling thread."},
    {"pop", pop, METH_NOARGS, "Close the calling thread's innermost range."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

M3I_PYTHON_MODULE(_nvtx, methods)
