// The schema of every native op. Each op is implemented in cpu/<op>.cpp.
#include <Python.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

TORCH_LIBRARY(fastfg, m) {
  m.def(
      "adam_topk(Tensor x, Tensor g, Tensor values, Tensor indices, Tensor? aux_g, Tensor? aux_values,"
      " Tensor? aux_indices, Tensor(a7!)[] weights, Tensor(a8!)[] m, Tensor(a9!)[] v, float lr, float beta1,"
      " float beta2, float eps, int step, bool unit_norm) -> (Tensor, Tensor)");
  m.def("decode_topk(Tensor values, Tensor indices, Tensor W_dec, Tensor? b_dec) -> Tensor");
  m.def("encode_topk(Tensor x, Tensor W_enc, Tensor b_enc, Tensor? b_dec, int k) -> (Tensor, Tensor)");
  m.def(
      "encode_project(Tensor x, Tensor g, Tensor W_enc, Tensor b_enc, Tensor W_dec, str activation, Tensor? threshold,"
      " Tensor? r_mag, Tensor? b_gate, Tensor? b_mag) -> Tensor");
  m.def("gate(Tensor scores, Tensor kappa, Tensor c_max) -> Tensor");
  m.def(
      "gated_relevancy(Tensor rows, Tensor q, Tensor k, Tensor v, Tensor dO, float scale, Tensor g, Tensor W_dec,"
      " Tensor values, Tensor indices, Tensor kappa, Tensor c_max, bool paper) -> (Tensor, Tensor, Tensor)");
  m.def("project(Tensor g, Tensor W_dec, Tensor values, Tensor indices) -> (Tensor, Tensor)");
  m.def(
      "relevancy(Tensor rows, Tensor q, Tensor k, Tensor v, Tensor dO, float scale, Tensor? gates, bool paper)"
      " -> Tensor");
}

// The ops have no derivative. If an input requires grad, the result does too, and its backward raises an error. Without
// these kernels, backward would silently leave the gradients out.
TORCH_LIBRARY_IMPL(fastfg, Autograd, m) {
  for (const char* op : {"adam_topk", "decode_topk", "encode_topk", "encode_project", "gate", "gated_relevancy", "project", "relevancy"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

// Importing fastfg._C loads the library, which registers the ops. The module itself is empty.
PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
