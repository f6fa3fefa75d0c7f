"""What runs on the device that is measured: programs that need Python, numpy and the runtime, and nothing of edgeadapt.

`runner.py` is the program; it is sent together with `system.py` and one file of `engines/`.
"""
