"""Checks every use of TensorRT's Python API in our source against the real bindings, without a GPU.

It checks names, keywords, numbers of arguments and types as the bindings declare them. Nothing runs: that a call does
what is meant is not shown here.
"""
