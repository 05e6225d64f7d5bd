"""The emulated GPU: the stock CUDA build of PyTorch on a machine without a GPU.

`build` compiles the C sources once, `machine` holds the shared state of the emulated cards, and
`launch` starts programs on them.
"""
