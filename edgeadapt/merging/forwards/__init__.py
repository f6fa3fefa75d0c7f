"""Adapters in edgeadapt's own layout in torch, one kind in each file: `attach` puts one into a model by hooks.

They follow the papers' equations on the tensors as saved; nothing is shared with how the same adapters are exported.
"""
