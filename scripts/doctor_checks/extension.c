/* The smallest Python module in C, answer() gives 42: built as Triton builds its launcher. */
#include <Python.h>
static PyObject *answer(PyObject *self, PyObject *none) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "doctor", "", -1, methods};
PyMODINIT_FUNC PyInit_doctor(void) { return PyModule_Create(&module); }
