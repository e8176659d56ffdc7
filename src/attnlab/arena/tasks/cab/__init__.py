"""The tasks of the Comprehensive Attention Benchmark (arXiv 2210.07661), on generated or bundled data and on its own.

Imports the arena's tasks and layers of `nn`. A task is named after its kind and pattern: `cab-sum-cc`.
"""
